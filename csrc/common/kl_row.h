// Statistics and gradient of one row on the CPU, in blocks of 1024 columns that stay in the
// first-level cache.
//
// A side of the row is any callable `const W* side(begin, count, buffer)`: it returns the columns
// [begin, begin + count) as W, either where they lie or widened into `buffer`. Sums are W inside a
// block and float64 across blocks. No torch header.
#pragma once

#include "common/kl_math.h"

#include <algorithm>

namespace deepfusion::inline DF_LEVEL {

inline constexpr int64_t kBlock = 1024;

template <typename W>
struct RowOptions {
  Divergence divergence = Divergence::kForwardKL;
  W beta = W(0.5);
  W inv_tau = W(1);
  bool with_kd = true;      // read the teacher
  bool with_ce = false;     // fill m_1, ln_l_1
  int64_t kd_columns = 0;   // the first min(V_s, V_t)
  int64_t all_columns = 0;  // V_s
};

template <typename W>
struct Extent {
  W max, min;
};

template <typename W>
inline Extent<W> extent(const W* x, int64_t count) {
  W max = W(kMissing), min = W(0);
#pragma omp simd reduction(max : max) reduction(min : min)
  for (int64_t v = 0; v < count; ++v) {
    max = x[v] > max ? x[v] : max;
    min = x[v] < min ? x[v] : min;
  }
  return {max, min};
}

// One side's block, its maximum, and whether some of it is missing; missing values are made finite
// in `buffer`.
template <typename W>
struct Block {
  const W* x;
  W max;
  bool has_missing;
};

template <typename W, typename Side>
inline Block<W> load_block(const Side& side, int64_t begin, int64_t count, W* buffer) {
  const W* x = side(begin, count, buffer);
  const Extent<W> of_x = extent(x, count);
  if (of_x.min > W(kMissing)) return {x, of_x.max, false};
  for (int64_t v = 0; v < count; ++v) buffer[v] = clean(x[v]);
  return {buffer, of_x.max, true};
}

template <typename W>
inline W log2_scale(W inv_tau) {
  return inv_tau * W(1.44269504088896340736);
}

template <typename W>
inline ExpSum<double> exp_sum(const Block<W>& block, int64_t count, W inv_tau) {
  const W* x = block.x;
  const W m = block.max, k = log2_scale(inv_tau);
  W l = W(0);
#pragma omp simd reduction(+ : l)
  for (int64_t v = 0; v < count; ++v) l += exp2_scaled(x[v] - m, k);
  return {m, l};
}

// Sums of one block; of a and r only what the divergence reads.
template <Divergence kDivergence, typename W>
inline KLState<double> kl_sums(const Block<W>& of_s, const Block<W>& of_t, int64_t count,
                               W inv_tau) {
  const W *s = of_s.x, *t = of_t.x;
  const W m_s = of_s.max, m_t = of_t.max, k = log2_scale(inv_tau);
  W l_s = W(0), l_t = W(0), weighted = W(0);
#pragma omp simd reduction(+ : l_s, l_t, weighted)
  for (int64_t v = 0; v < count; ++v) {
    const W x = s[v] - m_s, y = t[v] - m_t;
    const W e_x = exp2_scaled(x, k), e_y = exp2_scaled(y, k);
    l_s += e_x;
    l_t += e_y;
    if (kDivergence == Divergence::kForwardKL) weighted += e_y * (y - x);
    if (kDivergence == Divergence::kReverseKL) weighted += e_x * (x - y);
  }
  KLState<double> state;
  state.s = {m_s, l_s};
  state.t = {m_t, l_t};
  if (kDivergence == Divergence::kForwardKL) state.a = double(weighted) * inv_tau;
  if (kDivergence == Divergence::kReverseKL) state.r = double(weighted) * inv_tau;
  for (int64_t v = 0; (of_s.has_missing || of_t.has_missing) && v < count; ++v) {
    state.teacher_alone |= s[v] <= W(kMissing) && t[v] > W(kMissing);
    state.student_alone |= t[v] <= W(kMissing) && s[v] > W(kMissing);
  }
  return state;
}

template <typename W>
inline KLState<double> kl_sums(const Block<W>& of_s, const Block<W>& of_t, int64_t count,
                               const RowOptions<W>& options) {
  switch (options.divergence) {
    case Divergence::kForwardKL:
      return kl_sums<Divergence::kForwardKL>(of_s, of_t, count, options.inv_tau);
    case Divergence::kReverseKL:
      return kl_sums<Divergence::kReverseKL>(of_s, of_t, count, options.inv_tau);
    default:
      return kl_sums<Divergence::kJSD>(of_s, of_t, count, options.inv_tau);
  }
}

struct JsdSums {
  double k_s = 0, k_t = 0;
};

// Second sweep of jsd: it needs the final statistics.
template <typename W, typename Student, typename Teacher>
inline JsdSums jsd_sums(const Student& student, const Teacher& teacher, const RowStats<W>& stats,
                        const RowOptions<W>& options) {
  alignas(64) W s_buffer[kBlock], t_buffer[kBlock];
  const W beta = options.beta, inv_tau = options.inv_tau;
  JsdSums sums;
  for (int64_t begin = 0; begin < options.kd_columns; begin += kBlock) {
    const int64_t count = std::min(kBlock, options.kd_columns - begin);
    const W* s = student(begin, count, s_buffer);
    const W* t = teacher(begin, count, t_buffer);
    W k_s = W(0), k_t = W(0);
#pragma omp simd reduction(+ : k_s, k_t)
    for (int64_t v = 0; v < count; ++v) {
      const W ln_q = log_prob(s[v], stats.m_s, stats.ln_l_s, inv_tau);
      const W ln_p = log_prob(t[v], stats.m_t, stats.ln_l_t, inv_tau);
      const JsdPoint<W> at = jsd_point(ln_q, ln_p, beta);
      k_s += exp_nonpositive(ln_q) * at.v;
      k_t -= exp_nonpositive(ln_p) * at.w;
    }
    sums.k_s += k_s;
    sums.k_t += k_t;
  }
  return sums;
}

template <typename W>
struct RowResult {
  double kd = 0;  // of the row's divergence; 0 without KD
  RowStats<W> stats;
};

// One pass over the row (two for jsd).
template <typename W, typename Student, typename Teacher>
inline RowResult<W> row_statistics(const Student& student, const Teacher& teacher,
                                   const RowOptions<W>& options) {
  alignas(64) W s_buffer[kBlock], t_buffer[kBlock];
  const bool own_sum = options.with_ce && (options.inv_tau != W(1) || !options.with_kd ||
                                           options.all_columns > options.kd_columns);
  const int64_t kd_columns = options.with_kd ? options.kd_columns : 0;
  const double inv_tau = options.inv_tau;
  KLState<double> state;
  ExpSum<double> at_one;
  for (int64_t begin = 0; begin < kd_columns; begin += kBlock) {
    const int64_t count = std::min(kBlock, kd_columns - begin);
    const Block<W> s = load_block(student, begin, count, s_buffer);
    const Block<W> t = load_block(teacher, begin, count, t_buffer);
    state = merge(state, kl_sums(s, t, count, options), inv_tau);
    if (own_sum) at_one = merge(at_one, exp_sum(s, count, W(1)), 1.0);
  }
  for (int64_t begin = kd_columns; own_sum && begin < options.all_columns; begin += kBlock) {
    const int64_t count = std::min(kBlock, options.all_columns - begin);
    at_one = merge(at_one, exp_sum(load_block(student, begin, count, s_buffer), count, W(1)), 1.0);
  }
  RowResult<W> result;
  RowStats<W>& stats = result.stats;
  if (!own_sum) at_one = state.s;
  stats = {W(state.s.m), W(log_sum(state.s)), W(state.t.m),      W(log_sum(state.t)), W(0),
           W(0),         W(at_one.m),         W(log_sum(at_one))};
  if (!options.with_kd) return result;
  if (options.divergence == Divergence::kJSD) {
    const JsdSums sums = jsd_sums(student, teacher, stats, options);
    stats.k_s = W(sums.k_s);
    stats.k_t = W(sums.k_t);
    result.kd = options.beta * sums.k_t + (1.0 - options.beta) * sums.k_s;
  } else {
    result.kd = finish_kl(state, options.divergence == Divergence::kReverseKL);
    stats.k_s = stats.k_t = W(result.kd);
  }
  return result;
}

template <typename W>
struct RowScales {
  W kd = W(0);         // dloss * kd_weight * kappa / tau
  W ce = W(0);         // dloss * ce_weight
  int64_t label = -1;  // column of the one-hot; -1: none
};

// d forward_kl / d student: q and p straight from their exponentials, no logarithm and no missing
// value in the way.
template <typename W>
inline void forward_kl_gradient_block(const W* s, const W* t, int64_t count,
                                      const RowStats<W>& stats, W inv_tau, W scale, W* out) {
  const W m_s = stats.m_s, m_t = stats.m_t, k = log2_scale(inv_tau);
  const W of_q = W(scale * std::exp(-double(stats.ln_l_s))),
          of_p = W(scale * std::exp(-double(stats.ln_l_t)));
#pragma omp simd
  for (int64_t v = 0; v < count; ++v) {
    out[v] = exp2_scaled(s[v] - m_s, k) * of_q - exp2_scaled(t[v] - m_t, k) * of_p;
  }
}

// d KD of one block for the gradients that are wanted.
template <Divergence kDivergence, bool kStudent, bool kTeacher, typename W>
inline void kd_gradient_block(const W* s, const W* t, int64_t count, const RowStats<W>& stats,
                              W beta, W inv_tau, W scale, W* out_s, W* out_t) {
  const RowStats<W> saved = stats;
#pragma omp simd
  for (int64_t v = 0; v < count; ++v) {
    const W ln_q = log_prob(s[v], saved.m_s, saved.ln_l_s, inv_tau);
    const W ln_p = log_prob(t[v], saved.m_t, saved.ln_l_t, inv_tau);
    const W q = exp_nonpositive(ln_q), p = exp_nonpositive(ln_p);
    if constexpr (kStudent)
      out_s[v] = scale * student_slope<kDivergence>(ln_q, ln_p, q, p, beta, saved.k_s);
    if constexpr (kTeacher)
      out_t[v] = scale * teacher_slope<kDivergence>(ln_q, ln_p, q, p, beta, saved.k_t);
  }
}

template <Divergence kDivergence, typename W>
inline void kd_gradient_block(const W* s, const W* t, int64_t count, const RowStats<W>& stats,
                              W beta, W inv_tau, W scale, W* out_s, W* out_t) {
  if (out_s && out_t) {
    kd_gradient_block<kDivergence, true, true>(s, t, count, stats, beta, inv_tau, scale, out_s,
                                               out_t);
  } else if (out_t) {
    kd_gradient_block<kDivergence, false, true>(s, t, count, stats, beta, inv_tau, scale, out_s,
                                                out_t);
  } else if constexpr (kDivergence == Divergence::kForwardKL) {
    forward_kl_gradient_block(s, t, count, stats, inv_tau, scale, out_s);
  } else {
    kd_gradient_block<kDivergence, true, false>(s, t, count, stats, beta, inv_tau, scale, out_s,
                                                out_t);
  }
}

// CE's part of one block: scale (softmax(s) - onehot), added to what is there.
template <typename W>
inline void add_ce_gradient_block(const W* s, int64_t begin, int64_t count,
                                  const RowStats<W>& stats, const RowScales<W>& scales, W* out) {
  const W m = stats.m_1, ln_l = stats.ln_l_1, scale = scales.ce;
#pragma omp simd
  for (int64_t v = 0; v < count; ++v)
    out[v] += scale * exp_nonpositive(log_prob(s[v], m, ln_l, W(1)));
  if (scales.label >= begin && scales.label < begin + count) out[scales.label - begin] -= scale;
}

// The gradient of one block of columns at `begin`, all within the KD columns or all beyond them.
template <typename W>
inline void gradient_block(const W* s, const W* t, int64_t begin, int64_t count,
                           const RowStats<W>& stats, const RowOptions<W>& options,
                           const RowScales<W>& scales, W* out_s, W* out_t) {
  const W beta = options.beta, inv_tau = options.inv_tau, kd = scales.kd;
  if (!options.with_kd || begin >= options.kd_columns) {
    if (out_s) std::fill(out_s, out_s + count, W(0));
    if (out_t) std::fill(out_t, out_t + count, W(0));
  } else if (options.divergence == Divergence::kForwardKL) {
    kd_gradient_block<Divergence::kForwardKL>(s, t, count, stats, beta, inv_tau, kd, out_s, out_t);
  } else if (options.divergence == Divergence::kReverseKL) {
    kd_gradient_block<Divergence::kReverseKL>(s, t, count, stats, beta, inv_tau, kd, out_s, out_t);
  } else {
    kd_gradient_block<Divergence::kJSD>(s, t, count, stats, beta, inv_tau, kd, out_s, out_t);
  }
  if (options.with_ce && out_s) add_ce_gradient_block(s, begin, count, stats, scales, out_s);
}

}  // namespace deepfusion::inline DF_LEVEL
