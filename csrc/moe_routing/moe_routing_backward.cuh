// Backward kernel of the router: a warp a row, weights and losses together, dz written once.
#pragma once

#include "moe_routing/moe_routing_row.cuh"

namespace deepfusion {
inline namespace device {

constexpr int kBackwardWarps = 8;  // not measured

struct BackwardCall {
  const float *dweights, *daux, *weights, *picked, *lse, *mass;
  const void* logits;
  const int64_t *experts, *counts;
  void* dlogits;
  Kind kind;
  int64_t tokens;
  int32_t num_experts;
  Options options;
};

// What the chosen slots of row t give, into dz; returns sum_k u g over its divisor.
__device__ inline float selected_gradient(const BackwardCall& call, int64_t t, float* dz) {
  const Options& o = call.options;
  const int32_t lane = threadIdx.x % kWarp, K = static_cast<int32_t>(o.top_k);
  const float* g = call.dweights + t * K;
  const float* w = call.weights + t * K;
  const float* u = o.is_sigmoid ? call.picked + t * K : w;
  const int64_t* experts = call.experts + t * K;
  const float scale = static_cast<float>(o.scale);
  const bool is_normalised = o.is_selected_softmax() || (o.is_sigmoid && o.renormalize);
  float den = 1.0f, dot = 0.0f;
  if (o.is_sigmoid && o.renormalize) {
    float sum = 0.0f;
    for (int32_t k = lane; k < K; k += kWarp) sum += u[k];
    den = warp_sum(sum) + static_cast<float>(kTiny);
  }
  // divided before the sum: of one selected logit the gradient is then exactly 0
  const float unit = o.is_selected_softmax() ? scale : den;
  for (int32_t k = lane; k < K; k += kWarp) dot += u[k] / unit * g[k];
  dot = warp_sum(dot);
  const float mean = is_normalised ? dot : 0.0f;
  for (int32_t k = lane; k < K; k += kWarp) {
    const float slope = o.is_sigmoid ? scale * (u[k] * (1.0f - u[k])) / den : w[k];
    const int64_t e = experts[k];
    // a broken row's weights are NaN whatever its scores are
    const float value = w[k] != w[k] ? NAN : slope * (g[k] - mean);
    if (e >= 0 && e < call.num_experts) dz[e] = value;
  }
  return dot;
}

// At most 128 registers: left alone, ptxas aims at more warps on sm_90a and spills.
template <int kValues>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, 2)
    route_backward_kernel(BackwardCall call) {
  __shared__ float selected[kBackwardWarps][kValues * kWarp];
  const Options& o = call.options;
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, E = call.num_experts;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kBackwardWarps + warp;
  if (t >= call.tokens) return;
  const int64_t first = t * E * bytes_of(call.kind);
  const char* row = static_cast<const char*>(call.logits) + first;
  char* out = static_cast<char*>(call.dlogits) + first;
  float dz[kValues], s[kValues], pull[kValues];
  for (int i = 0; i < kValues; ++i) selected[warp][i * kWarp + lane] = 0.0f;
  __syncwarp();
  const float dot = selected_gradient(call, t, selected[warp]);
  __syncwarp();
  const double tokens = static_cast<double>(call.tokens), daux = *call.daux;
  const float pull_by_count = static_cast<float>(daux * o.balance * E / (tokens * tokens));
  float mean = 0.0f;
  const bool reads_logits = o.needs_lse() || o.needs_mass();
  const float lse = o.needs_lse() ? call.lse[t] : 0.0f;
  const float mass = o.needs_mass() ? call.mass[t] : 1.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int32_t e = i * kWarp + lane;
    dz[i] = selected[warp][e];
    s[i] = reads_logits && e < E ? load1(row, e, call.kind) : -INFINITY;
    pull[i] = o.balance != 0 && e < E ? pull_by_count * static_cast<float>(call.counts[e]) : 0.0f;
    if (o.balance != 0 && e < E)
      mean += pull[i] * (o.is_sigmoid ? sigmoid(s[i]) / mass : expf(s[i] - lse));
  }
  if (o.balance != 0) mean = warp_sum(mean);
  const bool is_through_all = !o.is_sigmoid && !o.is_selected_softmax();
  const float rest = o.z != 0 ? static_cast<float>(2.0 * daux * o.z / tokens) * lse : 0.0f;
  const float softmax_mean = o.is_sigmoid ? 0.0f : mean;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int32_t e = i * kWarp + lane;
    if (e >= E) continue;
    if (o.needs_lse()) {
      const float p = expf(s[i] - lse), own = o.is_sigmoid ? 0.0f : pull[i];
      // dot comes off first: against what the selected slots gave it may cancel
      if (is_through_all) dz[i] -= p * dot;
      dz[i] += p * (own - softmax_mean + rest);
    }
    if (o.needs_mass()) {
      const float share = sigmoid(s[i]);
      dz[i] += share / mass * (1.0f - share) * (pull[i] - mean);
    }
    store1(out, e, call.kind, dz[i]);
  }
}

}  // namespace device
}  // namespace deepfusion
