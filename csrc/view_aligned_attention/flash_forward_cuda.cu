// Attention by tiles, forward: four warps hold 16 queries each of one stage, keys pass in blocks.
// A block of keys past the diagonal is not visited, in any stage. The mathematics: attention.cuh.
#include "view_aligned_attention/launch.cuh"

namespace {

using namespace deepfusion;

constexpr int kStrips = 4, kQueries = kStrips * kTile;

struct ForwardCall {
  const void* qkv;
  void* y;
  float* lse;
  Head head;
  float scale;
};

// Offsets of what a block keeps in shared memory.
template <typename T, int kWidth>
struct Memory {
  // not measured: what fits 99 KiB and 128 registers
  static constexpr int kKeys = (kWidth == 128 ? 64 : 128) / static_cast<int>(sizeof(T));
  static constexpr int kRow = pitch_of<T>(kWidth) * static_cast<int>(sizeof(T));
  using OfStrip = StripMemory<T, kKeys>;
  static constexpr int kKeyAt = kQueries * kRow, kValueAt = kKeyAt + kKeys * kRow;
  static constexpr int kOrderAt = kValueAt + kKeys * kRow, kStripAt = kOrderAt + kKeys * 4;
  static constexpr int kBytes = kStripAt + kStrips * OfStrip::kBytes;
};

// Sums of 128 channels take 64 registers of a thread alone: fewer blocks leave it more.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kStrips* kWarp, kWidth == 128 ? 2 : blocks_of(kStrips * kWarp))
    flash_forward_kernel(ForwardCall call) {
  using At = Memory<T, kWidth>;
  constexpr int kKeys = At::kKeys, kPitch = pitch_of<T>(kWidth);
  extern __shared__ __align__(128) unsigned char memory[];
  T* queries = reinterpret_cast<T*>(memory);
  T* keys = reinterpret_cast<T*>(memory + At::kKeyAt);
  T* values = reinterpret_cast<T*>(memory + At::kValueAt);
  int* orders = reinterpret_cast<int*>(memory + At::kOrderAt);
  const int warp = threadIdx.x / kWarp;
  const typename At::OfStrip mine = {
      reinterpret_cast<float*>(memory + At::kStripAt + warp * At::OfStrip::kBytes)};
  Head head = call.head;
  const int lines = head.batch * head.heads * head.stages, block = blockIdx.x;
  head.sample = block % lines / (head.heads * head.stages);
  head.head = block % lines / head.stages % head.heads;
  const int stage = block % head.stages;
  // the last tile of a causal stage has most to do: it goes first
  const int first = (static_cast<int>(gridDim.x) / lines - 1 - block / lines) * kQueries;
  const T* qkv = static_cast<const T*>(call.qkv);
  write_numbers(reinterpret_cast<float*>(keys));
  const int64_t pitch = int64_t{3} * head.heads * kWidth;
  load_tile<kQueries, kWidth>(queries, qkv + head.part(head.row(stage, first), 0), pitch,
                              head.patches - first);
  __syncthreads();
  const Places<T> places(reinterpret_cast<const float*>(keys));
  Strip<T, kWidth, kKeys> strip;
  clear(strip.total);
  T* query = queries + warp * kTile * kPitch;
  const int top_row = first + warp * kTile, patch = top_row + lane_row();
  const int stop = head.causal ? min(first + kQueries, head.patches) : head.patches;
  for (int j = 0; j < head.stages; ++j) {
    for (int k = 0; k < stop; k += kKeys) {
      __syncthreads();
      const T* from = qkv + head.part(head.row(j, k), 1);
      load_tile<kKeys, kWidth>(keys, from, pitch, head.patches - k);
      load_tile<kKeys, kWidth>(values, from + head.heads * kWidth, pitch, head.patches - k);
      for (int c = threadIdx.x; c < kKeys; c += blockDim.x) orders[c] = head.order(k + c);
      __syncthreads();
      if (top_row < head.patches)
        strip.absorb(query, keys, values, orders, head.limit(patch), call.scale, mine, places);
    }
  }
  if (top_row >= head.patches) return;
  const float lse = strip.finish(query, mine, places);
  store_rows<kTile, kWidth>(query, threadIdx.x % kWarp, kWarp, [&](int r) {
    T* y = static_cast<T*>(call.y);
    return top_row + r < head.patches ? y + head.place(head.row(stage, top_row + r)) : nullptr;
  });
  if (threadIdx.x % 2 == 0 && patch < head.patches)
    call.lse[head.stat(stage * head.patches + patch)] = lse;
}

// y [J, B, Q, D] and lse [B, H, P] are written.
void stage_attention_forward_cuda(Tensor qkv, std::optional<Tensor> valid, int64_t heads,
                                  bool causal, double scale, Tensor y, Tensor lse) {
  const Kind kind = kind_of(qkv, kAttention, "features");
  torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  ForwardCall call = {};
  call.head =
      head_of(qkv.size(0), qkv.size(1), qkv.size(2), heads, qkv.size(3) / 3 / heads, valid, causal);
  call.qkv = qkv.const_data_ptr();
  call.y = y.mutable_data_ptr();
  call.lse = lse.mutable_data_ptr<float>();
  call.scale = static_cast<float>(scale) * kLog2E;
  check_pointer(call.qkv, "qkv");
  check_pointer(call.y, "y");
  const int64_t tiles = (qkv.size(2) + kQueries - 1) / kQueries;
  const int64_t blocks = tiles * qkv.size(0) * qkv.size(1) * heads;
  if (blocks == 0) return;
  with_kernel(kind, call.head.width, [&](auto element, auto width) {
    using T = typename decltype(element)::type;
    constexpr int kWidth = decltype(width)::value;
    launch(flash_forward_kernel<T, kWidth>, blocks, kStrips * kWarp, Memory<T, kWidth>::kBytes,
           call, current_stream(qkv.get_device_index()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepfusion_native, CUDA, m) {
  m.impl("stage_attention_forward", TORCH_BOX(&stage_attention_forward_cuda));
}
