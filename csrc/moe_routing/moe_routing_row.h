// One row of a router: its choice and weights, and the gradient of both and of the losses.
//
//   s = softmax(z) or sigmoid(z), c = s + bias (or z + bias), sel = K largest c, w = scale u / den
//   aux = balance E sum_e f_e P_e + z mean_t lse_t^2
#pragma once

#include "common/cpu.h"
#include "moe_routing/options.h"

#include <algorithm>
#include <vector>

namespace deepfusion::inline DF_LEVEL {

template <typename W>
inline constexpr W kLowest = -std::numeric_limits<W>::infinity();
template <typename W>
inline constexpr W kNaN = std::numeric_limits<W>::quiet_NaN();

template <typename W>
inline W sigmoid(W x) {
  return W(1) / (W(1) + exp_fast(-x));
}

// The `wanted` largest values, descending; of equals the lowest index first. A round per value: the
// maximum, then where it stands first. Values taken become NaN, which no comparison finds again;
// NOTE: so values must hold none, or a round finds nothing and writes past the end.
template <typename W>
inline void largest(W* values, int64_t count, int64_t wanted, int64_t* index) {
  const int32_t end = static_cast<int32_t>(count);
  for (int64_t round = 0; round < wanted; ++round) {
    W highest = kLowest<W>;
#pragma omp simd reduction(max : highest)
    for (int32_t i = 0; i < end; ++i) highest = values[i] > highest ? values[i] : highest;
    int32_t at = end;
#pragma omp simd reduction(min : at)
    for (int32_t i = 0; i < end; ++i) {
      const int32_t here = values[i] == highest ? i : end;
      at = here < at ? here : at;
    }
    index[round] = at;
    values[at] = kNaN<W>;
  }
}

// What one thread needs for one row.
template <typename W>
struct Scratch {
  std::vector<W> z, scores, choice, dselected, group_value;
  std::vector<int64_t> group_index;

  Scratch(int64_t num_experts, const Options& o)
      : z(num_experts),
        scores(num_experts),
        choice(num_experts),
        dselected(o.top_k),
        group_value(o.num_groups),
        group_index(o.top_groups) {}
};

// c = -inf outside the best groups.
template <typename W>
inline void keep_best_groups(int64_t num_experts, const Options& o, Scratch<W>& row) {
  const int64_t width = num_experts / o.num_groups;
  for (int64_t group = 0; group < o.num_groups; ++group) {
    const W* c = row.choice.data() + group * width;
    W first = kLowest<W>, second = kLowest<W>;
    for (int64_t i = 0; i < width; ++i) {
      second = std::max(second, std::min(first, c[i]));
      first = std::max(first, c[i]);
    }
    const W value = o.is_top2_sum ? first + second : first;
    row.group_value[group] = value == value ? value : kLowest<W>;
  }
  largest(row.group_value.data(), o.num_groups, o.top_groups, row.group_index.data());
  for (int64_t group = 0; group < o.num_groups; ++group) {
    if (std::find(row.group_index.begin(), row.group_index.end(), group) != row.group_index.end())
      continue;
    std::fill_n(row.choice.begin() + group * width, width, kLowest<W>);
  }
}

template <typename W>
struct RowFacts {
  W max, lse, mass;
  bool is_broken, is_void;
};

// Widens a row into row.z and, where asked, fills row.scores.
template <typename T, typename W>
inline RowFacts<W> read_row(const T* logits, int64_t num_experts, const Options& o,
                            bool needs_scores, Scratch<W>& row) {
  W* z = row.z.data();
  W* s = row.scores.data();
  W max = kLowest<W>;
  int nans = 0;
#pragma omp simd reduction(max : max) reduction(+ : nans)
  for (int64_t e = 0; e < num_experts; ++e) {
    z[e] = to_wide(logits[e]);
    max = z[e] > max ? z[e] : max;
    nans += z[e] != z[e];
  }
  W lse = 0, mass = 0;
  if (o.needs_lse() || (needs_scores && !o.is_sigmoid)) {
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t e = 0; e < num_experts; ++e) {
      s[e] = exp_nonpositive(z[e] - max);
      sum += s[e];
    }
    lse = max + std::log(sum);
    const W inverse = W(1) / sum;
#pragma omp simd
    for (int64_t e = 0; e < num_experts; ++e) s[e] *= inverse;
  }
  // after the softmax, whose place the sigmoid scores take: a z-loss asks for both
  if (o.is_sigmoid && needs_scores) {
#pragma omp simd reduction(+ : mass)
    for (int64_t e = 0; e < num_experts; ++e) {
      s[e] = sigmoid(z[e]);
      mass += s[e];
    }
  }
  const bool is_void = max == kLowest<W> && nans == 0;
  return {max, lse, mass, nans > 0 || is_void, is_void};
}

template <typename W>
inline void choose(const RowFacts<W>& facts, const W* bias, int64_t num_experts, const Options& o,
                   Scratch<W>& row, int64_t* experts) {
  const W* from = o.chooses_by_logit(bias != nullptr) ? row.z.data() : row.scores.data();
  W* c = row.choice.data();
  for (int64_t e = 0; e < num_experts; ++e) {
    const W value = bias ? from[e] + bias[e] : from[e];
    c[e] = facts.is_void || value != value ? kLowest<W> : value;
  }
  if (o.num_groups > 0) keep_best_groups(num_experts, o, row);
  largest(c, num_experts, o.top_k, experts);
}

// weights [K] and, for sigmoid scores, picked [K].
template <typename W>
inline void weigh(const RowFacts<W>& facts, const int64_t* experts, const Options& o,
                  const Scratch<W>& row, W* weights, W* picked) {
  W den = 1;
  if (o.is_sigmoid) {
    W sum = 0;
    for (int64_t k = 0; k < o.top_k; ++k) {
      weights[k] = picked[k] = sigmoid(row.z[experts[k]]);
      sum += picked[k];
    }
    if (o.renormalize) den = sum + W(kTiny);
  } else if (o.is_selected_softmax()) {
    W max = kLowest<W>;
    for (int64_t k = 0; k < o.top_k; ++k) max = std::max(max, row.z[experts[k]]);
    den = 0;
    for (int64_t k = 0; k < o.top_k; ++k) {
      weights[k] = exp_nonpositive(row.z[experts[k]] - max);
      den += weights[k];
    }
  } else {
    for (int64_t k = 0; k < o.top_k; ++k) weights[k] = row.scores[experts[k]];
  }
  for (int64_t k = 0; k < o.top_k; ++k) {
    weights[k] = facts.is_broken ? kNaN<W> : W(o.scale) * (weights[k] / den);
  }
}

template <typename W>
struct BackwardIn {
  const W *dweights, *weights, *picked, *lse, *mass, *pull;
  const int64_t* experts;
  W z_factor;  // 2 daux z / T
};

// What the chosen slots give, into dsel [K]; returns sum_k w g (over its
// divisor where weights are normalised).
template <typename W>
inline W selected_gradient(const BackwardIn<W>& in, int64_t t, const Options& o, W* dsel) {
  const W* g = in.dweights + t * o.top_k;
  const W* w = in.weights + t * o.top_k;
  const W* u = o.is_sigmoid ? in.picked + t * o.top_k : w;
  const W scale = W(o.scale);
  const bool is_normalised = o.is_selected_softmax() || (o.is_sigmoid && o.renormalize);
  W sum = 0, dot = 0;
  for (int64_t k = 0; k < o.top_k; ++k) sum += u[k];
  const W den = o.is_sigmoid && o.renormalize ? sum + W(kTiny) : W(1);
  // divided before the sum: of one selected logit the gradient is then exactly 0
  const W unit = o.is_selected_softmax() ? scale : den;
  for (int64_t k = 0; k < o.top_k; ++k) dot += u[k] / unit * g[k];
  const W mean = is_normalised ? dot : W(0);
  for (int64_t k = 0; k < o.top_k; ++k) {
    const W slope = o.is_sigmoid ? scale * (u[k] * (W(1) - u[k])) / den : w[k];
    // a broken row's weights are NaN whatever its scores are
    dsel[k] = w[k] != w[k] ? kNaN<W> : slope * (g[k] - mean);
  }
  return dot;
}

// dz += s (1 - s) / S (pull - mean of pull), the balance loss of sigmoid scores.
template <typename T, typename W>
inline void add_sigmoid_balance(const T* logits, const W* pull, W mass, int64_t num_experts,
                                W* scores, W* dz) {
  W mean = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t e = 0; e < num_experts; ++e) {
    scores[e] = sigmoid(to_wide(logits[e]));
    mean += pull[e] * (scores[e] / mass);
  }
#pragma omp simd
  for (int64_t e = 0; e < num_experts; ++e) {
    dz[e] += scores[e] / mass * (W(1) - scores[e]) * (pull[e] - mean);
  }
}

// dz += p (pull - mean of pull + rest) - p dot: all that goes through the softmax over every
// expert. dot comes off first: against what the selected slots gave it may cancel.
template <typename T, typename W>
inline void add_softmax(const T* logits, const W* pull, W lse, W rest, W dot, int64_t num_experts,
                        W* p, W* dz) {
  W mean = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t e = 0; e < num_experts; ++e) {
    p[e] = exp_fast(to_wide(logits[e]) - lse);
    mean += pull[e] * p[e];
  }
#pragma omp simd
  for (int64_t e = 0; e < num_experts; ++e)
    dz[e] = (dz[e] - p[e] * dot) + p[e] * (pull[e] - mean + rest);
}

}  // namespace deepfusion::inline DF_LEVEL
