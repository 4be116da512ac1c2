// Statistics and gradient of one row on the CPU, from the sums of its blocks. No torch header.
#pragma once

#include "common/kl_sums.h"

namespace deepfusion::inline DF_LEVEL {

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
    const bool reverse = options.divergence == Divergence::kReverseKL;
    result.kd = finish_kl(state, reverse);
    save_kl(state, result.kd, reverse, stats);
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

// d reverse_kl / d student = q (gap - mean gap), gap = ln q - ln p but for a constant: float64, as
// in the mean.
template <typename W>
inline void reverse_kl_gradient_block(const W* s, const W* t, int64_t count,
                                      const RowStats<W>& stats, W inv_tau, W scale, W* out) {
  const W m_s = stats.m_s, ln_l_s = stats.ln_l_s;
  const double mean = (double(m_s) - double(stats.m_t)) * inv_tau + double(stats.k_t) +
                      (double(ln_l_s) - double(stats.ln_l_t) + double(stats.k_s));
#pragma omp simd
  for (int64_t v = 0; v < count; ++v) {
    const W x = clean(s[v]), y = clean(t[v]);
    const W q = exp_nonpositive((x - m_s) * inv_tau - ln_l_s);
    out[v] = scale * q * W((double(x) - double(y)) * inv_tau - mean);
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
  } else if constexpr (kDivergence == Divergence::kReverseKL) {
    reverse_kl_gradient_block(s, t, count, stats, inv_tau, scale, out_s);
  } else {
    kd_gradient_block<kDivergence, true, false>(s, t, count, stats, beta, inv_tau, scale, out_s,
                                                out_t);
  }
}

// CE's part of one block: scale (softmax(s) - onehot), added to what is there.
template <typename W>
inline void add_ce_gradient_block(const W* s, int64_t begin, int64_t count,
                                  const RowStats<W>& stats, const RowScales<W>& scales, W* out) {
  const W m = stats.m_1, scale = scales.ce, k = log2_scale(W(1));
  const W of_q = W(scale * std::exp(-double(stats.ln_l_1)));
#pragma omp simd
  for (int64_t v = 0; v < count; ++v) out[v] += exp2_scaled(s[v] - m, k) * of_q;
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
