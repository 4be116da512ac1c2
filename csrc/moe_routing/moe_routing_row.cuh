// One row of a router in the registers of one warp: lane l holds experts l, l + 32, l + 64, ...
//
//   s = softmax(z) or sigmoid(z), c = s + bias (or z + bias), sel = K largest c, w = scale u / den
//
// Experts past the end are logits of -inf, which change no sum and no maximum.
#pragma once

#include "common/warp_select.cuh"
#include "moe_routing/options.h"

namespace deepfusion {
inline namespace device {

struct RowFacts {
  float max, inv_sum, lse, mass;
  bool is_broken, is_void;  // without weights; without any logit above -inf, too
};

__device__ __forceinline__ float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}

__device__ __forceinline__ float score_of(float z, const RowFacts& facts, const Options& o) {
  return o.is_sigmoid ? sigmoid(z) : expf(z - facts.max) * facts.inv_sum;
}

template <int kValues>
__device__ __forceinline__ RowFacts read_row(const void* row, Kind kind, int32_t num_experts,
                                             const Options& o, bool needs_scores,
                                             float (&z)[kValues]) {
  const int32_t lane = threadIdx.x % kWarp;
  RowFacts facts = {-INFINITY, 0.0f, 0.0f, 0.0f, false, false};
  bool is_nan = false;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int32_t e = i * kWarp + lane;
    z[i] = e < num_experts ? load1(row, e, kind) : -INFINITY;
    facts.max = fmaxf(facts.max, z[i]);
    is_nan |= z[i] != z[i];
  }
  facts.max = warp_max(facts.max);
  is_nan = __any_sync(kAllLanes, is_nan);
  facts.is_void = facts.max == -INFINITY && !is_nan;
  facts.is_broken = is_nan || facts.is_void;
  if (o.needs_lse() || (needs_scores && !o.is_sigmoid)) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kValues; ++i) sum += expf(z[i] - facts.max);
    sum = warp_sum(sum);
    facts.lse = facts.max + logf(sum);
    facts.inv_sum = 1.0f / sum;
  }
  if (o.needs_mass()) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) facts.mass += sigmoid(z[i]);
    facts.mass = warp_sum(facts.mass);
  }
  return facts;
}

// Of a row's values c [E], the bits of the groups that are kept: bit g % 32 of kept[g / 32]. A
// group is kept if fewer than top_groups groups come before it. c is overwritten.
__device__ __forceinline__ void keep_best_groups(uint32_t* c, int32_t num_experts, const Options& o,
                                                 uint32_t* kept) {
  const int32_t lane = threadIdx.x % kWarp;
  const int32_t num_groups = static_cast<int32_t>(o.num_groups), width = num_experts / num_groups;
  for (int32_t base = 0; base < num_groups; base += kWarp) {
    const int32_t group = base + lane;
    float first = -INFINITY, second = -INFINITY;
    if (group < num_groups) {
      // each lane begins elsewhere, so that groups of 32 do not all ask one bank of shared memory
      for (int32_t step = 0, at = lane % width; step < width; ++step) {
        const float value = __uint_as_float(c[group * width + at]);
        second = fmaxf(second, fminf(first, value));
        first = fmaxf(first, value);
        at = at + 1 < width ? at + 1 : 0;
      }
    }
    // in place: groups to come lie at or past (base + 32) width
    __syncwarp();
    if (group < num_groups) c[group] = sort_key(o.is_top2_sum ? first + second : first);
  }
  __syncwarp();
  for (int32_t base = 0; base < num_groups; base += kWarp) {
    const int32_t group = base + lane;
    const uint32_t own = group < num_groups ? c[group] : kNoKey;
    int32_t before = 0;
    for (int32_t other = 0; other < num_groups; ++other)
      before += c[other] > own || (c[other] == own && other < group);
    const uint32_t bits = __ballot_sync(kAllLanes, group < num_groups && before < o.top_groups);
    if (lane == 0) kept[base / kWarp] = bits;
  }
}

// Ranks the K chosen experts in `keys`. Shared memory of the warp: c [32 kValues], kept [kValues].
template <int kValues>
__device__ __forceinline__ void choose(const float (&z)[kValues], const RowFacts& facts,
                                       const float* bias, int32_t num_experts, const Options& o,
                                       uint32_t* c, uint32_t* kept, uint32_t (&keys)[kValues]) {
  const int32_t lane = threadIdx.x % kWarp;
  const bool by_logit = o.chooses_by_logit(bias != nullptr), is_grouped = o.num_groups > 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int32_t e = i * kWarp + lane;
    keys[i] = kNoKey;
    if (e >= num_experts) continue;
    float value = by_logit ? z[i] : score_of(z[i], facts, o);
    if (bias) value += __ldg(bias + e);
    if (facts.is_void || value != value) value = -INFINITY;
    keys[i] = sort_key(value);
    if (is_grouped) c[e] = __float_as_uint(value);
  }
  if (is_grouped) {
    const int32_t width = num_experts / static_cast<int32_t>(o.num_groups);
    __syncwarp();
    keep_best_groups(c, num_experts, o, kept);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int32_t e = i * kWarp + lane, group = e / width;
      if (e < num_experts && !(kept[group / 32] >> group % 32 & 1)) keys[i] = kLowestKey;
    }
    // the next row of this warp writes c and kept again
    __syncwarp();
  }
  for (int32_t rank = 0; rank < o.top_k; ++rank) take_largest(keys, rank);
}

// Writes the row's weights and experts [K] and, for sigmoid scores, picked [K].
template <int kValues>
__device__ __forceinline__ void weigh(const float (&z)[kValues], const uint32_t (&keys)[kValues],
                                      const RowFacts& facts, const Options& o, float* weights,
                                      int64_t* experts, float* picked) {
  const bool is_selected = o.is_selected_softmax();
  const float scale = static_cast<float>(o.scale);
  float top = -INFINITY, den = 0.0f;
  if (is_selected) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) top = rank_of(keys[i]) < 0 ? top : fmaxf(top, z[i]);
    top = warp_max(top);
  }
  // u of a chosen expert
  const auto value = [&](float x) { return is_selected ? expf(x - top) : score_of(x, facts, o); };
  if (is_selected || (o.is_sigmoid && o.renormalize)) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) den += rank_of(keys[i]) < 0 ? 0.0f : value(z[i]);
    den = warp_sum(den);
    if (o.is_sigmoid) den += static_cast<float>(kTiny);
  } else {
    den = 1.0f;
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const int32_t rank = rank_of(keys[i]);
    if (rank < 0) continue;
    const float u = value(z[i]);
    weights[rank] = facts.is_broken ? NAN : scale * (u / den);
    experts[rank] = i * kWarp + static_cast<int32_t>(threadIdx.x % kWarp);
    if (picked) picked[rank] = u;
  }
}

}  // namespace device
}  // namespace deepfusion
