// Attention by tiles, backward: one kernel, launched twice. A tile of rows stays, the rows of the
// other side pass, and every gradient has one owner that sums in order: the same bits every time.
//
//   queries stay, keys pass    dQ = s dS K                            A = 2^(S - L)
//   keys stay, queries pass    dK = s dS^T Q      dV = A^T dY         dS = A (dY V^T - delta)
#include "view_aligned_attention/backward.cuh"
#include "view_aligned_attention/launch.cuh"

namespace {

using namespace deepfusion;

// Rows that stay and rows that pass: of float32 and 128 channels fewer, for 99 KiB. Not measured.
template <typename T, int kWidth>
struct Tiles {
  static constexpr bool kIsLarge = sizeof(T) == 4 && kWidth == 128;
  static constexpr int kStrips = kIsLarge ? 2 : 4, kRows = kStrips * kTile;
  static constexpr int kPassing = kIsLarge ? 16 : 32;
  // two warps a strip: of keys one sums dK, the other dV; of wide queries each half of the columns
  static constexpr int halves(bool keys_stay) { return keys_stay || kWidth == 128 ? 2 : 1; }
  static constexpr int threads(bool keys_stay) { return kStrips * kWarp * halves(keys_stay); }
};

// Offsets of what a block keeps in shared memory.
template <typename T, int kWidth>
struct Memory {
  using Of = Tiles<T, kWidth>;
  static constexpr int kT = static_cast<int>(sizeof(T)), kPitch = pitch_of<T>(kWidth);
  static constexpr int kScorePitch = pitch_of<T>(Of::kPassing);
  static constexpr int kStay = Of::kRows * kPitch * kT, kPass = Of::kPassing * kPitch * kT;
  static constexpr int kScores = Of::kRows * kScorePitch * kT;
  static constexpr int kPassAt = 2 * kStay, kWeightAt = kPassAt + 2 * kPass;
  static constexpr int kStayStatsAt = kWeightAt + 2 * kScores;
  static constexpr int kPassStatsAt = kStayStatsAt + Of::kRows * RowStats::kBytes;
  static constexpr int kBytes = kPassStatsAt + Of::kPassing * RowStats::kBytes;
};

// Either side's rows and what is known of them: queries with their dY, or keys with their values.
template <int kRows, int kWidth, typename T>
__device__ __forceinline__ void load_side(const BackwardCall& call, const Head& head, bool keys,
                                          int stage, int first, T* rows, T* others,
                                          const RowStats& stats) {
  const int64_t row = head.row(stage, first), width = head.heads * kWidth;
  const T* from = static_cast<const T*>(call.qkv) + head.part(row, keys ? 1 : 0);
  const T* too = keys ? from + width : static_cast<const T*>(call.dy) + head.place(row);
  const int count = head.patches - first;
  load_tile<kRows, kWidth>(rows, from, 3 * width, count);
  load_tile<kRows, kWidth>(others, too, keys ? 3 * width : width, count);
  for (int r = threadIdx.x; r < kRows; r += blockDim.x) {
    if (keys)
      stats.orders[r] = head.order(first + r);
    else
      load_query_stats(call, head, r < count ? stage * head.patches + first + r : -1, stats, r);
  }
}

template <typename T, int kWidth, bool kKeysStay>
__global__ void __launch_bounds__(Tiles<T, kWidth>::threads(kKeysStay),
                                  blocks_of(Tiles<T, kWidth>::threads(kKeysStay)))
    flash_backward_kernel(BackwardCall call) {
  using Of = Tiles<T, kWidth>;
  using At = Memory<T, kWidth>;
  constexpr int kRows = Of::kRows, kPassing = Of::kPassing, kHalves = Of::halves(kKeysStay);
  constexpr int kColumns = kKeysStay ? kWidth : kWidth / kHalves;
  constexpr int kPitch = At::kPitch, kScorePitch = At::kScorePitch;
  extern __shared__ __align__(128) unsigned char memory[];
  T* stay = reinterpret_cast<T*>(memory);
  T* pass = reinterpret_cast<T*>(memory + At::kPassAt);
  T *stay_too = stay + kRows * kPitch, *pass_too = pass + kPassing * kPitch;
  const RowStats stay_stats(memory + At::kStayStatsAt, kRows);
  const RowStats pass_stats(memory + At::kPassStatsAt, kPassing);
  Head head = call.head;
  const int lines = head.batch * head.heads * head.stages, block = blockIdx.x;
  head.sample = block % lines / (head.heads * head.stages);
  head.head = block % lines / head.stages % head.heads;
  const int stage = block % head.stages, tiles = static_cast<int>(gridDim.x) / lines;
  // what a causal mask leaves most to do goes first
  const int first = (kKeysStay ? block / lines : tiles - 1 - block / lines) * kRows;
  write_numbers(reinterpret_cast<float*>(pass));
  load_side<kRows, kWidth>(call, head, kKeysStay, stage, first, stay, stay_too, stay_stats);
  __syncthreads();
  const Places<T> places(reinterpret_cast<const float*>(pass));
  const int warp = threadIdx.x / kWarp, strip = warp % Of::kStrips, half = warp / Of::kStrips;
  T* weights = reinterpret_cast<T*>(memory + At::kWeightAt) + strip * kTile * kScorePitch;
  T* dscores = weights + kRows * kScorePitch;
  const int column = kKeysStay ? 0 : half * kColumns;
  Sums<T> sums[kColumns / kTile];
  clear(sums);
  const int begin = head.causal && kKeysStay ? first / kPassing * kPassing : 0;
  const int stop = head.causal && !kKeysStay ? min(first + kRows, head.patches) : head.patches;
  for (int j = 0; j < head.stages; ++j) {
    for (int p = begin; p < stop; p += kPassing) {
      __syncthreads();
      load_side<kPassing, kWidth>(call, head, !kKeysStay, j, p, pass, pass_too, pass_stats);
      __syncthreads();
      for (int t = half; t < kPassing / kTile; t += kHalves) {
        score_tile<T, kWidth, kKeysStay, kScorePitch>(
            stay + strip * kTile * kPitch, stay_too + strip * kTile * kPitch,
            pass + t * kTile * kPitch, pass_too + t * kTile * kPitch,
            stay_stats.from(strip * kTile), pass_stats.from(t * kTile), call.scale, places,
            weights + t * kTile, dscores + t * kTile);
      }
      if constexpr (kHalves == 2) {
        __syncthreads();
      } else {
        __syncwarp();
      }
      const bool is_value = kKeysStay && half == 1;
      multiply<Along::kRows, Along::kRows, kPassing, kColumns / kTile, T>(
          sums, is_value ? weights : dscores, kScorePitch, (is_value ? pass_too : pass) + column,
          kPitch);
    }
  }
  __syncthreads();
  const float upstream = *call.upstream;
  const bool is_value = kKeysStay && half == 1;
  const float factor = is_value ? upstream : upstream * call.scale * kLn2;
  T* out = stay + ((is_value ? kRows : 0) + strip * kTile) * kPitch;
  put_sums<T>(sums, places, out + column, kPitch,
              [&](float sum, int, int) { return sum * factor; });
  if (!kKeysStay && kHalves == 2) __syncthreads();
  if (!kKeysStay && half == 1) return;
  __syncwarp();
  store_rows<kTile, kWidth>(out, threadIdx.x % kWarp, kWarp, [&](int r) {
    const int patch = first + strip * kTile + r, part = kKeysStay ? 1 + half : 0;
    T* dqkv = static_cast<T*>(call.dqkv);
    return patch < head.patches ? dqkv + head.part(head.row(stage, patch), part) : nullptr;
  });
}

template <typename T, int kWidth, bool kKeysStay>
void start(const BackwardCall& call, cudaStream_t stream) {
  using Of = Tiles<T, kWidth>;
  const int64_t tiles = (call.head.patches + Of::kRows - 1) / Of::kRows;
  launch(flash_backward_kernel<T, kWidth, kKeysStay>,
         tiles * call.head.stages * call.head.batch * call.head.heads, Of::threads(kKeysStay),
         Memory<T, kWidth>::kBytes, call, stream);
}

// dqkv [J, B, Q, 3 D] = upstream times the gradient of dy.
void stage_attention_backward_cuda(Tensor qkv, Tensor lse, Tensor dy, Tensor delta,
                                   std::optional<Tensor> valid, int64_t heads, bool causal,
                                   double scale, Tensor upstream, Tensor dqkv) {
  torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const BackwardCall call =
      backward_call(qkv, lse, dy, delta, valid, heads, causal, scale, upstream, dqkv);
  if (qkv.numel() == 0) return;
  const cudaStream_t stream = current_stream(qkv.get_device_index());
  with_kernel(kind_of(qkv, kAttention, "features"), call.head.width, [&](auto element, auto width) {
    using T = typename decltype(element)::type;
    constexpr int kWidth = decltype(width)::value;
    start<T, kWidth, true>(call, stream);
    start<T, kWidth, false>(call, stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepfusion_native, CUDA, m) {
  m.impl("stage_attention_backward", TORCH_BOX(&stage_attention_backward_cuda));
}
