// Sums over one row on the CPU, in blocks of 1024 columns that stay in the first-level cache.
//
// A side of the row is any callable `const W* side(begin, count, buffer)`: it returns the columns
// [begin, begin + count) as W, either where they lie or widened into `buffer`. Sums are W inside a
// block and float64 across blocks. No torch header.
#pragma once

#include "common/kl_math.h"

#include <algorithm>
#include <type_traits>

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

// Sums of one block; of a and r only what the divergence reads. r and l_s are float64 where
// reverse KL subtracts their quotient, the mean of ln q - ln p: it may be 100 times what is left.
template <Divergence kDivergence, typename W>
inline KLState<double> kl_sums(const Block<W>& of_s, const Block<W>& of_t, int64_t count,
                               W inv_tau) {
  const W *s = of_s.x, *t = of_t.x;
  const W m_s = of_s.max, m_t = of_t.max, k = log2_scale(inv_tau);
  const double m_gap = double(m_s) - double(m_t);
  std::conditional_t<kDivergence == Divergence::kReverseKL, double, W> l_s = 0;
  W l_t = W(0), weighted = W(0);
  double r = 0;
#pragma omp simd reduction(+ : l_s, l_t, weighted, r)
  for (int64_t v = 0; v < count; ++v) {
    const W x = s[v] - m_s, y = t[v] - m_t;
    const W e_x = exp2_scaled(x, k), e_y = exp2_scaled(y, k);
    l_s += e_x;
    l_t += e_y;
    if (kDivergence == Divergence::kForwardKL) weighted += e_y * (y - x);
    if (kDivergence == Divergence::kReverseKL)
      r += double(e_x) * ((double(s[v]) - double(t[v])) - m_gap);
  }
  KLState<double> state;
  state.s = {m_s, l_s};
  state.t = {m_t, l_t};
  if (kDivergence == Divergence::kForwardKL) state.a = double(weighted) * inv_tau;
  if (kDivergence == Divergence::kReverseKL) state.r = r * inv_tau;
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

// Saves a KL of merged sums. Reverse KL leaves k_t, which only the teacher's gradient of the others
// reads, to what the rounding of ln l and k_s loses of the mean of ln q - ln p.
template <typename W>
inline void save_kl(const KLState<double>& state, double kl, bool reverse, RowStats<W>& stats) {
  stats.k_s = stats.k_t = W(kl);
  if (!reverse) return;
  const double saved = double(stats.ln_l_t) - double(stats.ln_l_s) - double(stats.k_s);
  stats.k_t = W(state.r / state.s.l + saved);
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

}  // namespace deepfusion::inline DF_LEVEL
