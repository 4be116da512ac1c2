// What the attention kernels share: where a head's rows are, rows in and out of shared memory,
// which keys a query sees, and one block of keys taken into the online softmax of 16 queries.
//
//   top' = max(top, max S)     f = 2^(top - top')     norm = norm f + sum 2^(S - top')
//   total = total f + 2^(S - top') V                  Y = total / norm     L = (top + log2 norm) ln
//   2
//
// Token (j, i) of sample b is row (j B + b) Q + i. Scores are in base 2.
#pragma once

#include "view_aligned_attention/tiles.cuh"

namespace deepfusion {
inline namespace device {

// Blocks of a multiprocessor that leave a thread 128 registers.
__host__ __device__ constexpr int blocks_of(int threads) {
  return 512 / threads;
}

constexpr int kNever = 0x7fffffff;  // order of a key that nobody sees
constexpr float kLn2 = 0.693147180559945f, kLog2E = 1.44269504088896f;

// One head of one sample.
struct Head {
  int stages, batch, patches, heads, width;
  const bool* valid;
  bool causal;
  int sample, head;

  __device__ int tokens() const { return stages * patches; }
  __device__ int64_t row(int stage, int patch) const {
    return (static_cast<int64_t>(stage) * batch + sample) * patches + patch;
  }
  __device__ int64_t row(int token) const { return row(token / patches, token % patches); }
  // where part 0, 1, 2 (Q, K, V) of a row of QKV begins
  __device__ int64_t part(int64_t row, int part) const {
    return (row * 3 + part) * heads * width + head * width;
  }
  __device__ int64_t place(int64_t row) const { return row * heads * width + head * width; }
  __device__ int64_t stat(int token) const {
    return (static_cast<int64_t>(sample) * heads + head) * tokens() + token;
  }
  // a query sees the keys whose order is at most its limit
  __device__ int order(int patch) const {
    if (patch >= patches) return kNever;
    return valid && !valid[static_cast<int64_t>(sample) * patches + patch] ? kNever : patch;
  }
  __device__ int limit(int patch) const { return causal ? patch : kNever - 1; }
};

// Elements of a row in shared memory: 16 bytes more than the row, so that rows fall on other banks.
template <typename T>
__host__ __device__ constexpr int pitch_of(int columns) {
  return columns + 16 / static_cast<int>(sizeof(T));
}

// [kRows, kColumns] to shared memory, 16 bytes a thread; row(r) is null where there is none, and
// columns from `columns` on do not exist: zeros.
template <int kRows, int kColumns, typename T, typename Row>
__device__ __forceinline__ void load_rows(T* to, int columns, const Row& row) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kVectors = kColumns / kVector;
#pragma unroll 1
  for (int v = threadIdx.x; v < kRows * kVectors; v += blockDim.x) {
    const int r = v / kVectors, c = v % kVectors * kVector;
    const T* from = row(r);
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (from && c < columns) bits = __ldg(reinterpret_cast<const uint4*>(from + c));
    *reinterpret_cast<uint4*>(to + r * pitch_of<T>(kColumns) + c) = bits;
  }
}

// The same of neighbouring rows, of which `count` exist.
template <int kRows, int kColumns, typename T>
__device__ __forceinline__ void load_tile(T* to, const T* from, int64_t pitch, int count) {
  load_rows<kRows, kColumns>(to, kColumns,
                             [=](int r) { return r < count ? from + r * pitch : nullptr; });
}

// [kRows, kColumns] from shared memory by `threads` threads, of which this is number `thread`.
template <int kRows, int kColumns, typename T, typename Row>
__device__ __forceinline__ void store_rows(const T* from, int thread, int threads, const Row& row) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kVectors = kColumns / kVector;
#pragma unroll 1
  for (int v = thread; v < kRows * kVectors; v += threads) {
    const int r = v / kVectors, c = v % kVectors * kVector;
    T* to = row(r);
    if (to)
      *reinterpret_cast<uint4*>(to + c) =
          *reinterpret_cast<const uint4*>(from + r * pitch_of<T>(kColumns) + c);
  }
}

// factor(row, column) times the sums, rounded, to 16 rows of shared memory.
template <typename T, int kTiles, typename Value>
__device__ __forceinline__ void put_sums(const Sums<T> (&sums)[kTiles], const Places<T>& places,
                                         T* to, int pitch, const Value& value) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int row = places.row(i), column = t * kTile + places.column(i);
      to[row * pitch + column] = from_float<T>(value(sums[t].x[i], row, column));
    }
  }
}

// The numbers that Places reads; to be awaited.
__device__ __forceinline__ void write_numbers(float* numbers) {
  for (int e = threadIdx.x; e < kTile * kTile; e += blockDim.x) numbers[e] = static_cast<float>(e);
}

// Shared memory of one warp: scores, weights and fades of 16 queries and kKeys keys.
template <typename T, int kKeys>
struct StripMemory {
  static constexpr int kScorePitch = pitch_of<float>(kKeys), kWeightPitch = pitch_of<T>(kKeys);
  static constexpr int kFades = kTile * kScorePitch, kFloats = kFades + kTile;
  static constexpr int kBytes = kFloats * static_cast<int>(sizeof(float)) +
                                kTile * kWeightPitch * static_cast<int>(sizeof(T));
  float* scores;

  __device__ float* fades() const { return scores + kFades; }
  __device__ T* weights() const { return reinterpret_cast<T*>(scores + kFloats); }
};

// 16 queries of a warp on their way through the keys.
template <typename T, int kWidth, int kKeys>
struct Strip {
  static constexpr int kTiles = kWidth / kTile, kPitch = pitch_of<T>(kWidth);
  Sums<T> total[kTiles];
  float top = -INFINITY, norm = 0.0f;  // of row lane / 2, in both of its lanes

  // keys, values [kKeys, kWidth] and the keys' orders; limit of this lane's row
  __device__ __forceinline__ void absorb(const T* query, const T* keys, const T* values,
                                         const int* orders, int limit, float scale,
                                         const StripMemory<T, kKeys>& memory,
                                         const Places<T>& places) {
    constexpr int kScorePitch = StripMemory<T, kKeys>::kScorePitch;
    {
      Sums<T> scores[kKeys / kTile];
      clear(scores);
      multiply<Along::kRows, Along::kColumns, kWidth, kKeys / kTile, T>(scores, query, kPitch, keys,
                                                                        kPitch);
#pragma unroll
      for (int t = 0; t < kKeys / kTile; ++t)
        store_sums(memory.scores + t * kTile, scores[t], kScorePitch);
    }
    __syncwarp();
    // the two lanes of a row take its columns by turns: neighbours in other banks
    const int row = lane_row(), odd = threadIdx.x % 2;
    float line[kKeys / 2], highest = top;
#pragma unroll
    for (int c = 0; c < kKeys / 2; ++c) {
      const int column = 2 * c + odd;
      const float score = memory.scores[row * kScorePitch + column] * scale;
      line[c] = orders[column] <= limit ? score : -INFINITY;
      highest = fmaxf(highest, line[c]);
    }
    highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
    // NOTE: while no key is seen, inf - inf would be NaN
    const float shift = highest == -INFINITY ? 0.0f : highest, fade = exp2f(top - shift);
    float sum = 0.0f;
    T* weights = memory.weights();
#pragma unroll
    for (int c = 0; c < kKeys / 2; ++c) {
      const float weight = exp2f(line[c] - shift);
      sum += weight;
      weights[row * StripMemory<T, kKeys>::kWeightPitch + 2 * c + odd] = from_float<T>(weight);
    }
    norm = fmaf(norm, fade, sum + __shfl_xor_sync(kAllLanes, sum, 1));
    top = highest;
    if (odd == 0) memory.fades()[row] = fade;
    __syncwarp();
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) total[t].x[i] *= memory.fades()[places.row(i)];
    }
    multiply<Along::kRows, Along::kRows, kKeys, kTiles, T>(
        total, weights, StripMemory<T, kKeys>::kWeightPitch, values, kPitch);
  }

  // Y of the 16 queries in their own rows of shared memory; L of this lane's row.
  __device__ __forceinline__ float finish(T* query, const StripMemory<T, kKeys>& memory,
                                          const Places<T>& places) {
    __syncwarp();
    const bool is_blind = norm == 0.0f;
    if (threadIdx.x % 2 == 0) memory.fades()[lane_row()] = is_blind ? 0.0f : 1.0f / norm;
    __syncwarp();
    put_sums<T>(total, places, query, kPitch,
                [&](float sum, int row, int) { return sum * memory.fades()[row]; });
    __syncwarp();
    return is_blind ? INFINITY : (top + log2f(norm)) * kLn2;
  }
};

}  // namespace device
}  // namespace deepfusion
