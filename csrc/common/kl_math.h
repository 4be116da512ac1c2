// Distillation of one row: partial sums, their merge, and the value and slope at one column.
//
//   x = s / tau, y = t / tau, q = softmax(x), p = softmax(y);   raw logits at or below -1e30 count
//   as -inf forward_kl = sum p (ln p - ln q)     reverse_kl = sum q (ln q - ln p) jsd        = beta
//   KL(p | m) + (1 - beta) KL(q | m),  m = beta p + (1 - beta) q
//
// Compiled for CPU levels and for CUDA (C++17): the primitives exp_nonpositive, expm1_nonpositive,
// log1p_nonpositive come from vector_math.h there and from cuda.cuh here. No torch header.
#pragma once

#ifdef __CUDACC__
#include "common/cuda.cuh"
#define DF_FN __device__ __forceinline__
#define DF_LEVEL device
#else
#include "common/vector_math.h"
#define DF_FN inline
#endif

#include <cmath>
#include <cstdint>

namespace deepfusion {
inline namespace DF_LEVEL {

enum class Divergence : int64_t { kForwardKL = 0, kReverseKL = 1, kJSD = 2 };

constexpr float kMissing = -1e30f;

// NOTE: not max(v, kMissing), which would swallow NaN.
template <typename W>
DF_FN W clean(W v) {
  return v < W(kMissing) ? W(kMissing) : v;
}

// Sum of e^((v - m) / tau) over some columns.
template <typename A>
struct ExpSum {
  A m = A(kMissing);
  A l = A(0);
};

// e^d for a difference of maxima; most merges change neither maximum.
template <typename A>
DF_FN A rescale(A d) {
  return d == A(0) ? A(1) : std::exp(d);
}

// NOTE: a factor of 0 erases weighted sums over columns all missing: they may be infinite.
template <typename A>
DF_FN A scaled(A sum, A factor) {
  return factor == A(0) ? A(0) : sum * factor;
}

// NOTE: not scaled(): l is never infinite, and its NaN must outlive columns that are all missing.
template <typename A>
DF_FN ExpSum<A> merge(const ExpSum<A>& x, const ExpSum<A>& y, A inv_tau) {
  const A m = x.m > y.m ? x.m : y.m;
  return {m, x.l * rescale((x.m - m) * inv_tau) + y.l * rescale((y.m - m) * inv_tau)};
}

// Partial sums over some columns of a row. Shifted by the maxima, so that a common offset of the
// logits cancels:
//   a = sum e^((t - m_t) / tau) gap,  r = -sum e^((s - m_s) / tau) gap,  gap = (t - m_t) / tau - (s
//   - m_s) / tau
template <typename A>
struct KLState {
  ExpSum<A> s, t;
  A a = A(0), r = A(0);
  bool teacher_alone = false;  // some column has s = -inf, t > -inf: forward_kl is +inf
  bool student_alone = false;  // the reverse: reverse_kl is +inf
};

template <typename A>
DF_FN KLState<A> merge(const KLState<A>& x, const KLState<A>& y, A inv_tau) {
  KLState<A> z;
  z.s = merge(x.s, y.s, inv_tau);
  z.t = merge(x.t, y.t, inv_tau);
  const A xs = (x.s.m - z.s.m) * inv_tau, xt = (x.t.m - z.t.m) * inv_tau;
  const A ys = (y.s.m - z.s.m) * inv_tau, yt = (y.t.m - z.t.m) * inv_tau;
  z.a = scaled(x.a + x.t.l * (xt - xs), rescale(xt)) + scaled(y.a + y.t.l * (yt - ys), rescale(yt));
  z.r = scaled(x.r + x.s.l * (xs - xt), rescale(xs)) + scaled(y.r + y.s.l * (ys - yt), rescale(ys));
  z.teacher_alone = x.teacher_alone || y.teacher_alone;
  z.student_alone = x.student_alone || y.student_alone;
  return z;
}

// What is saved of a row: 8 numbers, this order in every backend. m and ln l stay apart: their sum
// would round at the size of the logits, which a near teacher's gradient does not survive.
template <typename W>
struct RowStats {
  W m_s, ln_l_s, m_t, ln_l_t;
  W k_s, k_t;     // what d student and d teacher subtract: KD, or jsd's KL(q | m) and KL(p | m)
  W m_1, ln_l_1;  // of the student at temperature 1 over all of its columns
};
constexpr int64_t kNumStats = 8;

// ln l; NaN where every column was missing, so that no plausible number hides it.
template <typename A>
DF_FN A log_sum(const ExpSum<A>& sum) {
  return sum.m <= A(kMissing) ? A(NAN) : std::log(sum.l);
}

// One-pass KL from merged sums; reverse: KL(q | p).
template <typename A>
DF_FN A finish_kl(const KLState<A>& state, bool reverse) {
  const A ln_l_s = log_sum(state.s), ln_l_t = log_sum(state.t);
  const bool infinite = reverse ? state.student_alone : state.teacher_alone;
  if (infinite) return ln_l_s + ln_l_t == ln_l_s + ln_l_t ? A(INFINITY) : A(NAN);
  const A kl =
      reverse ? state.r / state.s.l - ln_l_s + ln_l_t : state.a / state.t.l - ln_l_t + ln_l_s;
  return kl < A(0) ? A(0) : kl;
}

// ln q or ln p at one column.
template <typename W>
DF_FN W log_prob(W v, W m, W ln_l, W inv_tau) {
  return (clean(v) - m) * inv_tau - ln_l;
}

template <typename W>
struct JsdPoint {
  W w, v;  // ln(m / p), ln(q / m)
};

// Stable at any distance: the mixture is never formed in probability space.
template <typename W>
DF_FN JsdPoint<W> jsd_point(W ln_q, W ln_p, W beta) {
  const W d = ln_q - ln_p;
  const W e = expm1_nonpositive(d >= W(0) ? -d : d);
  const W z = log1p_nonpositive((d >= W(0) ? beta : W(1) - beta) * e);
  return {d >= W(0) ? d + z : z, d >= W(0) ? -z : d - z};
}

// d KD / d x at one column.
template <Divergence kDivergence, typename W>
DF_FN W student_slope(W ln_q, W ln_p, W q, W p, W beta, W k_s) {
  if (kDivergence == Divergence::kForwardKL) return q - p;
  if (kDivergence == Divergence::kReverseKL) return q * (ln_q - ln_p - k_s);
  return (W(1) - beta) * q * (jsd_point(ln_q, ln_p, beta).v - k_s);
}

// d KD / d y at one column.
template <Divergence kDivergence, typename W>
DF_FN W teacher_slope(W ln_q, W ln_p, W q, W p, W beta, W k_t) {
  if (kDivergence == Divergence::kForwardKL) return p * (ln_p - ln_q - k_t);
  if (kDivergence == Divergence::kReverseKL) return p - q;
  return beta * p * (-jsd_point(ln_q, ln_p, beta).w - k_t);
}

}  // namespace DF_LEVEL
}  // namespace deepfusion
