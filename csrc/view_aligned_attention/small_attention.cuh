// Attention of few tokens, forward: a block keeps one head of one sample whole, its projection
// included, whose X passes in steps of 64 columns. A strip of 16 tokens has three warps that form
// its Q, K and V at once, or one that forms them by turns; scores, weights and Y never leave the
// block.
#pragma once

#include "view_aligned_attention/attention.cuh"

namespace deepfusion {
inline namespace device {

struct SmallForwardCall {
  const void *x, *weight, *bias;
  void *qkv, *y;
  float* lse;
  int64_t stride_stage, stride_sample, stride_patch;
  Head head;
  float scale;
};

// Offsets of what a block keeps in shared memory: Q, K, V, and the operands of the projection.
// Where three warps share a strip those come first, as all sums are in registers until they have
// passed; where a warp has its strip alone, Q, K and V come by turns, and the operands stand behind
// them.
template <typename T, int kWidth, int kStrips>
struct SmallForwardMemory {
  static constexpr int kRows = kStrips * kTile, kStep = 64, kKeys = 32;
  static constexpr int kT = static_cast<int>(sizeof(T));
  // with 8 strips three warps each would have too few registers
  static constexpr int kShare = kStrips == 4 ? 3 : 1, kThreads = kShare * kStrips * kWarp;
  using OfStrip = StripMemory<T, kKeys>;
  static constexpr int kPart = kRows * pitch_of<T>(kWidth) * kT, kStripAt = 3 * kPart;
  static constexpr int kInputAt = kShare == 3 ? 0 : kStripAt;
  static constexpr int kWeightAt = kInputAt + kRows * pitch_of<T>(kStep) * kT;
  static constexpr int kProjection = kWeightAt + kShare * kWidth * pitch_of<T>(kStep) * kT;
  static constexpr int kAttention = kStripAt + kStrips * OfStrip::kBytes;
  static constexpr int kOrderAt = kProjection > kAttention ? kProjection : kAttention;
  static constexpr int kBytes = kOrderAt + kRows * 4;
};

// sums = this warp's strip of part `turn + group` of Q, K, V
template <typename T, int kWidth, int kStrips>
__device__ __forceinline__ void project_strip(const SmallForwardCall& call, const Head& head,
                                              unsigned char* memory, int strip, int turn, int group,
                                              Sums<T> (&sums)[kWidth / kTile]) {
  using At = SmallForwardMemory<T, kWidth, kStrips>;
  constexpr int kStep = At::kStep, kPitch = pitch_of<T>(kStep);
  T* x = reinterpret_cast<T*>(memory + At::kInputAt);
  T* weight = reinterpret_cast<T*>(memory + At::kWeightAt);
  const int columns = head.heads * kWidth;
  for (int first = 0; first < columns; first += kStep) {
    __syncthreads();
    load_rows<At::kRows, kStep>(x, columns - first, [&](int r) -> const T* {
      if (r >= head.tokens()) return nullptr;
      return static_cast<const T*>(call.x) + r / head.patches * call.stride_stage +
             head.sample * call.stride_sample + r % head.patches * call.stride_patch + first;
    });
    load_rows<At::kShare * kWidth, kStep>(weight, columns - first, [&](int r) {
      const int row = ((turn + r / kWidth) * head.heads + head.head) * kWidth + r % kWidth;
      return static_cast<const T*>(call.weight) + static_cast<int64_t>(row) * columns + first;
    });
    __syncthreads();
    multiply<Along::kRows, Along::kColumns, kStep, kWidth / kTile, T>(
        sums, x + strip * kTile * kPitch, kPitch, weight + group * kWidth * kPitch, kPitch);
  }
}

// Q, K and V of this warp's strip, the bias added, to shared memory and from there to QKV.
template <typename T, int kWidth, int kStrips>
__device__ __forceinline__ void project(const SmallForwardCall& call, const Head& head,
                                        unsigned char* memory, int strip, int group,
                                        const Places<T>& places) {
  using At = SmallForwardMemory<T, kWidth, kStrips>;
  constexpr int kPitch = pitch_of<T>(kWidth);
  const int first = strip * kTile;
  for (int turn = 0; turn < 3; turn += At::kShare) {
    const int part = turn + group;
    Sums<T> sums[kWidth / kTile];
    clear(sums);
    project_strip<T, kWidth, kStrips>(call, head, memory, strip, turn, group, sums);
    __syncthreads();
    T* own = reinterpret_cast<T*>(memory) + (part * At::kRows + first) * kPitch;
    put_sums<T>(sums, places, own, kPitch, [&](float sum, int, int column) {
      const int64_t at = (part * head.heads + head.head) * kWidth + column;
      return call.bias ? sum + to_float(static_cast<const T*>(call.bias)[at]) : sum;
    });
    __syncwarp();
    store_rows<kTile, kWidth>(own, threadIdx.x % kWarp, kWarp, [&](int r) {
      T* qkv = static_cast<T*>(call.qkv);
      return first + r < head.tokens() ? qkv + head.part(head.row(first + r), part) : nullptr;
    });
  }
  __syncthreads();
}

template <typename T, int kWidth, int kStrips>
__global__ void __launch_bounds__(SmallForwardMemory<T, kWidth, kStrips>::kThreads,
                                  blocks_of(SmallForwardMemory<T, kWidth, kStrips>::kThreads))
    small_forward_kernel(SmallForwardCall call) {
  using At = SmallForwardMemory<T, kWidth, kStrips>;
  constexpr int kPitch = pitch_of<T>(kWidth), kKeys = At::kKeys;
  extern __shared__ __align__(128) unsigned char memory[];
  Head head = call.head;
  head.sample = static_cast<int>(blockIdx.x) / head.heads;
  head.head = static_cast<int>(blockIdx.x) % head.heads;
  const int strip = threadIdx.x / kWarp % kStrips, group = threadIdx.x / kWarp / kStrips;
  write_numbers(reinterpret_cast<float*>(memory));
  int* orders = reinterpret_cast<int*>(memory + At::kOrderAt);
  for (int p = threadIdx.x; p < At::kRows; p += blockDim.x)
    orders[p] = p < head.tokens() ? head.order(p % head.patches) : kNever;
  __syncthreads();
  const Places<T> places(reinterpret_cast<const float*>(memory));
  project<T, kWidth, kStrips>(call, head, memory, strip, group, places);
  const int first = strip * kTile, token = first + lane_row();
  if (group > 0 || first >= head.tokens()) return;
  T *parts = reinterpret_cast<T*>(memory), *own = parts + first * kPitch;
  Strip<T, kWidth, kKeys> queries;
  clear(queries.total);
  const typename At::OfStrip mine = {
      reinterpret_cast<float*>(memory + At::kStripAt + strip * At::OfStrip::kBytes)};
  const int limit = head.limit(token % head.patches);
  for (int k = 0; k < head.tokens(); k += kKeys) {
    const T* keys = parts + (At::kRows + k) * kPitch;
    queries.absorb(own, keys, keys + At::kRows * kPitch, orders + k, limit, call.scale, mine,
                   places);
  }
  const float lse = queries.finish(own, mine, places);
  store_rows<kTile, kWidth>(own, threadIdx.x % kWarp, kWarp, [&](int r) {
    T* y = static_cast<T*>(call.y);
    return first + r < head.tokens() ? y + head.place(head.row(first + r)) : nullptr;
  });
  if (threadIdx.x % 2 == 0 && token < head.tokens()) call.lse[head.stat(token)] = lse;
}

}  // namespace device
}  // namespace deepfusion
