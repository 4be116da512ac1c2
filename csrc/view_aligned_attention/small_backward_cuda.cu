// Attention of few tokens, backward: a block keeps the keys and values of one head of one sample,
// queries pass by 32, and what a block of queries sees is all there is to its dQ. Five products:
//
//   A = 2^(S - L)    dY V^T    dV += A^T dY    dK += s dS^T Q    dQ = s dS K    dS = A (dY V^T -
//   delta)
#include "view_aligned_attention/backward.cuh"
#include "view_aligned_attention/launch.cuh"

namespace {

using namespace deepfusion;

constexpr int kQueries = 32;

// Offsets of what a block keeps in shared memory.
template <typename T, int kWidth, int kStrips>
struct Memory {
  static constexpr int kT = static_cast<int>(sizeof(T)), kRows = kStrips * kTile;
  static constexpr int kPitch = pitch_of<T>(kWidth), kScorePitch = pitch_of<T>(kRows);
  static constexpr int kKept = kRows * kPitch * kT, kPassed = kQueries * kPitch * kT;
  static constexpr int kQueryAt = 2 * kKept, kScoreAt = kQueryAt + 3 * kPassed;
  static constexpr int kStatsAt = kScoreAt + 2 * kQueries * kScorePitch * kT;
  static constexpr int kOrderAt = kStatsAt + kQueries * RowStats::kBytes;
  static constexpr int kBytes = kOrderAt + kRows * RowStats::kBytes;
};

// Sums of 64 channels, of dK and dV, take 64 registers of a thread alone: fewer blocks leave it
// more.
template <int kWidth, int kStrips>
constexpr int kBlocks = kWidth < 64    ? blocks_of(kStrips * kWarp)
                        : kStrips == 4 ? 3
                                       : 1;

// A warp a strip of 16 keys; dQ of the block's queries tile by tile, by whichever warp.
template <typename T, int kWidth, int kStrips>
__global__ void __launch_bounds__(kStrips* kWarp, kBlocks<kWidth, kStrips>)
    small_backward_kernel(BackwardCall call) {
  using At = Memory<T, kWidth, kStrips>;
  constexpr int kPitch = At::kPitch, kScorePitch = At::kScorePitch, kTiles = kWidth / kTile;
  extern __shared__ __align__(128) unsigned char memory[];
  T* keys = reinterpret_cast<T*>(memory);
  T* queries = reinterpret_cast<T*>(memory + At::kQueryAt);
  T* weights = reinterpret_cast<T*>(memory + At::kScoreAt);
  T *values = keys + At::kRows * kPitch, *dscores = weights + kQueries * kScorePitch;
  T *douts = queries + kQueries * kPitch, *dqueries = douts + kQueries * kPitch;
  const RowStats of_queries(memory + At::kStatsAt, kQueries);
  const RowStats of_keys(memory + At::kOrderAt, At::kRows);
  Head head = call.head;
  head.sample = static_cast<int>(blockIdx.x) / head.heads;
  head.head = static_cast<int>(blockIdx.x) % head.heads;
  const int tokens = head.tokens(), warp = threadIdx.x / kWarp;
  const T *qkv = static_cast<const T*>(call.qkv), *dy = static_cast<const T*>(call.dy);
  T* dqkv = static_cast<T*>(call.dqkv);
  write_numbers(reinterpret_cast<float*>(weights));
  const auto load_part = [&](auto rows, T* to, int first, int part) {
    load_rows<decltype(rows)::value, kWidth>(to, kWidth, [&](int r) {
      return first + r < tokens ? qkv + head.part(head.row(first + r), part) : nullptr;
    });
  };
  load_part(std::integral_constant<int, At::kRows>(), keys, 0, 1);
  load_part(std::integral_constant<int, At::kRows>(), values, 0, 2);
  for (int p = threadIdx.x; p < At::kRows; p += blockDim.x)
    of_keys.orders[p] = p < tokens ? head.order(p % head.patches) : kNever;
  __syncthreads();
  const Places<T> places(reinterpret_cast<const float*>(weights));
  Sums<T> dkey[kTiles], dvalue[kTiles];
  clear(dkey);
  clear(dvalue);
  const float upstream = *call.upstream, factor = upstream * call.scale * kLn2;
  for (int first = 0; first < tokens; first += kQueries) {
    load_part(std::integral_constant<int, kQueries>(), queries, first, 0);
    load_rows<kQueries, kWidth>(douts, kWidth, [&](int r) {
      return first + r < tokens ? dy + head.place(head.row(first + r)) : nullptr;
    });
    for (int r = threadIdx.x; r < kQueries; r += blockDim.x)
      load_query_stats(call, head, first + r < tokens ? first + r : -1, of_queries, r);
    __syncthreads();
    for (int r = 0; r < kQueries; r += kTile) {
      const int place = r * kScorePitch + warp * kTile;
      score_tile<T, kWidth, false, kScorePitch, true>(
          queries + r * kPitch, douts + r * kPitch, keys + warp * kTile * kPitch,
          values + warp * kTile * kPitch, of_queries.from(r), of_keys.from(warp * kTile),
          call.scale, places, weights + place, dscores + place);
    }
    __syncthreads();
    multiply<Along::kColumns, Along::kRows, kQueries, kTiles, T>(dvalue, weights + warp * kTile,
                                                                 kScorePitch, douts, kPitch);
    multiply<Along::kColumns, Along::kRows, kQueries, kTiles, T>(dkey, dscores + warp * kTile,
                                                                 kScorePitch, queries, kPitch);
    for (int tile = warp; tile < kQueries / kTile * kTiles; tile += kStrips) {
      const int r = tile / kTiles * kTile, column = tile % kTiles * kTile;
      Sums<T> dquery[1];
      clear(dquery);
      multiply<Along::kRows, Along::kRows, At::kRows, 1, T>(dquery, dscores + r * kScorePitch,
                                                            kScorePitch, keys + column, kPitch);
      put_sums<T>(dquery, places, dqueries + r * kPitch + column, kPitch,
                  [&](float sum, int, int) { return sum * factor; });
    }
    __syncthreads();
    store_rows<kQueries, kWidth>(dqueries, threadIdx.x, blockDim.x, [&](int r) {
      return first + r < tokens ? dqkv + head.part(head.row(first + r), 0) : nullptr;
    });
  }
  // the last barrier has let everyone through who read keys and values: their rows take the results
  T *own = keys + warp * kTile * kPitch, *own_too = values + warp * kTile * kPitch;
  put_sums<T>(dkey, places, own, kPitch, [&](float sum, int, int) { return sum * factor; });
  put_sums<T>(dvalue, places, own_too, kPitch, [&](float sum, int, int) { return sum * upstream; });
  __syncwarp();
  for (int part = 1; part <= 2; ++part) {
    store_rows<kTile, kWidth>(part == 1 ? own : own_too, threadIdx.x % kWarp, kWarp, [&](int r) {
      const int token = warp * kTile + r;
      return token < tokens ? dqkv + head.part(head.row(token), part) : nullptr;
    });
  }
}

template <typename T, int kWidth, int kStrips>
void start(const BackwardCall& call, cudaStream_t stream) {
  launch(small_backward_kernel<T, kWidth, kStrips>,
         static_cast<int64_t>(call.head.batch) * call.head.heads, kStrips * kWarp,
         Memory<T, kWidth, kStrips>::kBytes, call, stream);
}

// As stage_attention_backward, where small_attention_forward serves.
void small_attention_backward_cuda(Tensor qkv, Tensor lse, Tensor dy, Tensor delta,
                                   std::optional<Tensor> valid, int64_t heads, bool causal,
                                   double scale, Tensor upstream, Tensor dqkv) {
  torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const BackwardCall call =
      backward_call(qkv, lse, dy, delta, valid, heads, causal, scale, upstream, dqkv);
  const Kind kind = kind_of(qkv, kAttention, "features");
  const int64_t tokens = qkv.size(0) * qkv.size(2);
  STD_TORCH_CHECK(call.head.width <= 64 && tokens <= (kind == Kind::kFloat ? 64 : 128), kAttention,
                  ": too many tokens or channels for a head to stay on chip");
  if (qkv.numel() == 0) return;
  const cudaStream_t stream = current_stream(qkv.get_device_index());
  with_kernel(kind, call.head.width, [&](auto element, auto width) {
    using T = typename decltype(element)::type;
    constexpr int kWidth = decltype(width)::value;
    if constexpr (kWidth <= 64) {
      if constexpr (sizeof(T) == 2) {
        if (tokens > 64) return start<T, kWidth, 8>(call, stream);
      }
      start<T, kWidth, 4>(call, stream);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepfusion_native, CUDA, m) {
  m.impl("small_attention_backward", TORCH_BOX(&small_attention_backward_cuda));
}
