// Forward kernels of the router: a warp a row, then one block that adds up what the blocks counted.
#pragma once

#include "moe_routing/moe_routing_row.cuh"

namespace deepfusion {
inline namespace device {

constexpr int kMaxExperts = 1024;
// Every block leaves one row of partial sums for the last kernel to read. Not measured.
constexpr int kMaxBlocks = 256;
constexpr int kFinishThreads = 1024;

// Rows of a block: a warp takes 256 bytes of shared memory a value it holds, of 48 KiB.
constexpr int warps_for(int values) {
  return values > 8 ? 128 / values : 16;
}

struct ForwardCall {
  const void* logits;
  const float* bias;
  Kind kind;
  int64_t tokens;
  int32_t num_experts;
  Options options;
  float *weights, *picked, *lse, *mass;
  int64_t* experts;
  // of each block [blocks, E] and [blocks]
  int32_t* counts;
  float *scores, *squares;
};

template <int kValues>
__global__ void __launch_bounds__(warps_for(kValues) * kWarp, 16 / warps_for(kValues))
    route_forward_kernel(ForwardCall call) {
  constexpr int kWarps = warps_for(kValues);
  __shared__ int32_t counts[kValues * kWarp];
  __shared__ uint32_t choice[kWarps][kValues * kWarp];
  __shared__ float scores[kWarps][kValues * kWarp];
  __shared__ uint32_t kept[kWarps][kValues];
  __shared__ float of_warp[kWarps];
  const Options& o = call.options;
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, E = call.num_experts;
  const bool needs_scores = o.needs_scores(call.bias != nullptr);
  for (int32_t e = threadIdx.x; e < E; e += blockDim.x) counts[e] = 0;
  for (int32_t i = 0; i < kValues; ++i) scores[warp][i * kWarp + lane] = 0.0f;
  __syncthreads();
  float squares = 0.0f;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp; t < call.tokens;
       t += static_cast<int64_t>(gridDim.x) * kWarps) {
    const char* row = static_cast<const char*>(call.logits) + t * E * bytes_of(call.kind);
    float z[kValues];
    uint32_t keys[kValues];
    const RowFacts facts = read_row(row, call.kind, E, o, needs_scores, z);
    choose(z, facts, call.bias, E, o, choice[warp], kept[warp], keys);
    weigh(z, keys, facts, o, call.weights + t * o.top_k, call.experts + t * o.top_k,
          o.is_sigmoid ? call.picked + t * o.top_k : nullptr);
    const float share = o.is_sigmoid ? 1.0f / facts.mass : 1.0f;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (rank_of(keys[i]) >= 0) atomicAdd(&counts[i * kWarp + lane], 1);
      if (o.balance != 0) scores[warp][i * kWarp + lane] += score_of(z[i], facts, o) * share;
    }
    if (lane == 0 && o.needs_lse()) call.lse[t] = facts.lse;
    if (lane == 0 && o.needs_mass()) call.mass[t] = facts.mass;
    if (o.z != 0) squares += facts.lse * facts.lse;
  }
  if (lane == 0) of_warp[warp] = squares;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * E;
  for (int32_t e = threadIdx.x; e < E; e += blockDim.x) {
    call.counts[first + e] = counts[e];
    if (o.balance == 0) continue;
    float total = 0.0f;
    for (int32_t w = 0; w < kWarps; ++w) total += scores[w][e];
    call.scores[first + e] = total;
  }
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int32_t w = 0; w < kWarps; ++w) total += of_warp[w];
    call.squares[blockIdx.x] = total;
  }
}

// counts [E] and aux_loss [] from the blocks' sums. Threads are segments of blocks by experts; a
// segment is added in its order, then the segments in theirs.
__global__ void __launch_bounds__(kFinishThreads)
    route_finish_kernel(ForwardCall call, int32_t blocks, int64_t* counts, float* aux_loss) {
  __shared__ int64_t of_counts[kFinishThreads];
  __shared__ double of_scores[kFinishThreads];
  const Options& o = call.options;
  const int32_t E = call.num_experts, thread = threadIdx.x;
  const int32_t columns = (E + kWarp - 1) / kWarp * kWarp, segments = kFinishThreads / columns;
  const int32_t e = thread % columns, each = (blocks + segments - 1) / segments;
  const int32_t begin = thread / columns * each, end = min(begin + each, blocks);
  int64_t count = 0;
  double score = 0.0;
  if (e < E && thread / columns < segments) {
    for (int32_t block = begin; block < end; ++block) {
      count += call.counts[static_cast<int64_t>(block) * E + e];
      if (o.balance != 0) score += call.scores[static_cast<int64_t>(block) * E + e];
    }
  }
  of_counts[thread] = count;
  of_scores[thread] = score;
  __syncthreads();
  const double tokens = static_cast<double>(call.tokens);
  double loss = 0.0;
  if (thread < E) {
    for (int32_t segment = 1; segment < segments; ++segment) {
      count += of_counts[segment * columns + thread];
      score += of_scores[segment * columns + thread];
    }
    counts[thread] = count;
    if (o.balance != 0) loss = o.balance * E * (count / tokens) * (score / tokens);
  }
  if (o.z != 0 && thread < blocks) loss += o.z * (call.squares[thread] / tokens);
  __syncthreads();
  of_scores[thread] = loss;
  for (int32_t half = kFinishThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) of_scores[thread] += of_scores[thread + half];
  }
  if (thread == 0) *aux_loss = static_cast<float>(of_scores[0]);
}

}  // namespace device
}  // namespace deepfusion
