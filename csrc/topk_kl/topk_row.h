// Distillation of one row from K kept teacher tokens: one sweep of the vocabulary a direction.
//
// The forward sweep leaves out the kept columns, so that the mass outside them is summed by itself
// and not as 1 - sum, which would cancel where the student is sure. What concerns the K entries is
// float64.
#pragma once

#include "common/cpu.h"
#include "common/kl_row.h"

#include <algorithm>
#include <vector>

namespace deepfusion::inline DF_LEVEL {
namespace topk {

enum class Tail : int64_t { kBucket = 0, kZero = 1, kRenormalize = 2 };

struct Options {
  Tail tail;
  Divergence divergence;
  double beta, inv_tau, kd_weight, ce_weight, floor;
};

// What backward needs of a row; the order of the tensor `statistics` [T, 6].
struct Saved {
  double m = 0, ln_l = 0;      // of what q is normalised over, at the temperature
  double ln_q_o = 0;           // of the bucket
  double k_s = 0;              // KD, or jsd's KL(q | m)
  double m_1 = 0, ln_l_1 = 0;  // of all columns at temperature 1

  template <typename W>
  void store(W* to) const {
    const double values[] = {m, ln_l, ln_q_o, k_s, m_1, ln_l_1};
    for (double value : values) *to++ = static_cast<W>(value);
  }
  template <typename W>
  static Saved load(const W* from) {
    return {from[0], from[1], from[2], from[3], from[4], from[5]};
  }
};
inline constexpr int64_t kNumSaved = 6;

struct Entry {
  int64_t id;
  double ln_p;
};

// The first entry of each id within the vocabulary, by the block of columns it lies in.
class Kept {
 public:
  explicit Kept(int64_t columns)
      : seen_(columns, -1), block_start_((columns + kBlock - 1) / kBlock + 1) {}

  void read(int64_t row, const int64_t* ids, const double* ln_p, int64_t count) {
    const int64_t columns = static_cast<int64_t>(seen_.size());
    row_ = row;
    entries_.clear();
    std::fill(block_start_.begin(), block_start_.end(), 0);
    for (int64_t k = 0; k < count; ++k) {
      if (ids[k] < 0 || ids[k] >= columns || seen_[ids[k]] == row) continue;
      seen_[ids[k]] = row;
      entries_.push_back({ids[k], ln_p[k]});
      ++block_start_[ids[k] / kBlock + 1];
    }
    for (size_t b = 1; b < block_start_.size(); ++b) block_start_[b] += block_start_[b - 1];
    by_block_.resize(entries_.size());
    next_ = block_start_;
    for (const Entry& entry : entries_) by_block_[next_[entry.id / kBlock]++] = entry.id;
  }

  const std::vector<Entry>& entries() const { return entries_; }
  bool holds(int64_t id) const { return seen_[id] == row_; }

  template <typename Body>
  void in_block(int64_t begin, const Body& body) const {
    const int64_t b = begin / kBlock;
    for (int64_t at = block_start_[b]; at < block_start_[b + 1]; ++at) body(by_block_[at] - begin);
  }

 private:
  std::vector<int64_t> seen_;  // the row that met this id last
  std::vector<int64_t> block_start_, next_, by_block_;
  std::vector<Entry> entries_;
  int64_t row_ = -1;
};

template <typename T>
void widen(const T* from, int64_t count, wide_t<T>* to) {
#pragma omp simd
  for (int64_t v = 0; v < count; ++v) to[v] = clean(to_wide(from[v]));
}

// Sums over the columns outside the kept ones, at the temperature and at 1; l = 0 where none is
// left.
struct Outside {
  ExpSum<double> at_tau, at_one;
};

template <typename T>
Outside sum_outside(const T* s, int64_t columns, const Kept& kept, const Options& options) {
  using W = wide_t<T>;
  alignas(64) W buffer[kBlock];
  const bool own_one = options.ce_weight != 0 && options.inv_tau != 1.0;
  Outside outside;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t count = std::min(kBlock, columns - begin);
    widen(s + begin, count, buffer);
    kept.in_block(begin, [&](int64_t v) { buffer[v] = W(kMissing); });
    const Block<W> block = {buffer, extent<W>(buffer, count).max, false};
    const auto sum = exp_sum(block, count, W(options.inv_tau));
    outside.at_tau = merge(outside.at_tau, sum, options.inv_tau);
    if (own_one) outside.at_one = merge(outside.at_one, exp_sum(block, count, W(1)), 1.0);
  }
  if (!own_one) outside.at_one = outside.at_tau;
  // NOTE: missing columns count e^0 each as long as no other is there; NaN stays.
  for (ExpSum<double>* sum : {&outside.at_tau, &outside.at_one})
    if (sum->m <= kMissing && sum->l == sum->l) sum->l = 0;
  return outside;
}

// The K entries of one row, with the student's logits beside the teacher's ln p.
template <typename T>
struct Row {
  Row(const T* logits, const Kept& row_kept, const Options& row_options)
      : s(logits), kept(row_kept), options(row_options) {}

  double logit(const Entry& entry) const {
    return clean(static_cast<double>(to_wide(s[entry.id])));
  }

  ExpSum<double> sum_kept(double inv_tau) const {
    ExpSum<double> sum;
    for (const Entry& entry : kept.entries()) sum.m = std::max(sum.m, logit(entry));
    for (const Entry& entry : kept.entries()) sum.l += std::exp((logit(entry) - sum.m) * inv_tau);
    return sum;
  }

  double mass() const {
    double sum = 0;
    for (const Entry& entry : kept.entries()) sum += std::exp(entry.ln_p);
    return sum;
  }

  // ln of the teacher's mass outside, or of its normaliser over the kept.
  double ln_p_rest() const {
    const double rest = 1.0 - mass();
    return std::log(rest < options.floor ? options.floor : rest);
  }
  double ln_p_norm() const { return options.tail == Tail::kRenormalize ? std::log(mass()) : 0.0; }

  double ln_q(const Entry& entry, const Saved& saved) const {
    const double x = logit(entry);
    return x <= kMissing ? -INFINITY : (x - saved.m) * options.inv_tau - saved.ln_l;
  }

  const T* s;
  const Kept& kept;
  const Options& options;
};

struct Divergences {
  double forward = 0, reverse = 0, k_s = 0, k_t = 0;

  // One outcome; a probability of zero adds nothing, whatever stands beside it.
  void add(double ln_q, double ln_p, const Options& options) {
    const bool no_q = ln_q == -INFINITY, no_p = ln_p == -INFINITY;
    if (no_q && no_p) return;
    if (options.divergence == Divergence::kForwardKL) {
      if (!no_p) forward += no_q ? INFINITY : std::exp(ln_p) * (ln_p - ln_q);
    } else if (options.divergence == Divergence::kReverseKL) {
      if (!no_q) reverse += no_p ? INFINITY : std::exp(ln_q) * (ln_q - ln_p);
    } else {
      const JsdPoint<double> at = jsd_point(ln_q, ln_p, options.beta);
      if (!no_q) k_s += std::exp(ln_q) * at.v;
      if (!no_p) k_t -= std::exp(ln_p) * at.w;
    }
  }

  double total(const Options& options) const {
    return forward + reverse + options.beta * k_t + (1 - options.beta) * k_s;
  }
};

inline double h_of(double ln_q, double ln_p, double k_s, const Options& options) {
  if (options.divergence == Divergence::kForwardKL) return -std::exp(ln_p);
  if (ln_q == -INFINITY) return 0;
  if (options.divergence == Divergence::kReverseKL) return std::exp(ln_q) * (ln_q - ln_p - k_s);
  return (1 - options.beta) * std::exp(ln_q) * (jsd_point(ln_q, ln_p, options.beta).v - k_s);
}

// The divergence of one row; fills what backward needs of it.
template <typename T>
double divergence_of(const Row<T>& row, const Outside& outside, Saved& saved) {
  const Options& options = row.options;
  if (row.kept.entries().empty() && options.tail == Tail::kRenormalize) return 0;
  ExpSum<double> total = row.sum_kept(options.inv_tau);
  if (options.tail != Tail::kRenormalize) total = merge(outside.at_tau, total, options.inv_tau);
  saved.m = total.m;
  saved.ln_l = log_sum(total);
  Divergences sums;
  const double ln_p_norm = row.ln_p_norm();
  for (const Entry& entry : row.kept.entries())
    sums.add(row.ln_q(entry, saved), entry.ln_p - ln_p_norm, options);
  if (options.tail == Tail::kBucket) {
    const double q_o =
        outside.at_tau.l * std::exp((outside.at_tau.m - total.m) * options.inv_tau) / total.l;
    saved.ln_q_o = std::log(q_o < options.floor ? options.floor : q_o);
    sums.add(saved.ln_q_o, row.ln_p_rest(), options);
  }
  saved.k_s = options.divergence == Divergence::kReverseKL ? sums.reverse : sums.k_s;
  // a row without any distribution must not end as a plausible number
  return saved.ln_l == saved.ln_l ? sums.total(options) : NAN;
}

template <typename T>
double row_forward(const Row<T>& row, int64_t columns, int64_t label, Saved& saved) {
  const Options& options = row.options;
  const bool sweep = options.ce_weight != 0 || options.tail != Tail::kRenormalize;
  const Outside outside = sweep ? sum_outside(row.s, columns, row.kept, options) : Outside{};
  double loss = 0;
  if (options.kd_weight != 0) loss += options.kd_weight * divergence_of(row, outside, saved);
  if (options.ce_weight != 0) {
    const ExpSum<double> all = merge(outside.at_one, row.sum_kept(1.0), 1.0);
    saved.m_1 = all.m;
    saved.ln_l_1 = log_sum(all);
    loss += options.ce_weight * (all.m - to_wide(row.s[label]) + saved.ln_l_1);
  }
  return loss;
}

// Gradient at the columns outside: off q + ce softmax(s).
template <typename T>
void sweep_backward(const T* s, int64_t columns, const Saved& saved, double inv_tau, double off,
                    double ce, T* out) {
  using W = wide_t<T>;
  const W m = W(saved.m), ln_l = W(saved.ln_l), m_1 = W(saved.m_1), ln_l_1 = W(saved.ln_l_1);
  const W weight = W(off), weight_1 = W(ce), scale = W(inv_tau);
  if (off == 0 && ce == 0) {
    std::fill(out, out + columns, from_wide<T>(W(0)));
  } else if (ce == 0) {
#pragma omp simd
    for (int64_t v = 0; v < columns; ++v)
      out[v] = from_wide<T>(weight * exp_nonpositive(log_prob(to_wide(s[v]), m, ln_l, scale)));
  } else {
#pragma omp simd
    for (int64_t v = 0; v < columns; ++v) {
      const W x = to_wide(s[v]);
      const W kd = weight == W(0) ? W(0) : weight * exp_nonpositive(log_prob(x, m, ln_l, scale));
      out[v] = from_wide<T>(kd + weight_1 * exp_nonpositive(log_prob(x, m_1, ln_l_1, W(1))));
    }
  }
}

template <typename T>
void row_backward(const Row<T>& row, int64_t columns, int64_t label, const Saved& saved,
                  double dloss, T* out) {
  using W = wide_t<T>;
  const Options& options = row.options;
  const double c = dloss * options.kd_weight * options.inv_tau, ce = dloss * options.ce_weight;
  const double mass = row.mass(), ln_p_norm = row.ln_p_norm();
  double off = 0, sum_h = 0;
  if (options.divergence == Divergence::kForwardKL)
    sum_h = options.tail == Tail::kRenormalize ? -1.0 : -mass;
  if (options.tail == Tail::kBucket) {
    const double h_o = h_of(saved.ln_q_o, row.ln_p_rest(), saved.k_s, options);
    if (options.divergence == Divergence::kForwardKL) sum_h += h_o;
    off = h_o / std::exp(saved.ln_q_o) - sum_h;
  } else if (options.tail == Tail::kZero) {
    off = mass;
  }
  if (options.kd_weight == 0) off = 0;
  sweep_backward(row.s, columns, saved, options.inv_tau, c * off, ce, out);
  const auto soft = [&](double x) { return std::exp(x - saved.m_1 - saved.ln_l_1); };
  const auto hard = [&](int64_t id) { return id == label ? 1.0 : 0.0; };
  for (const Entry& entry : row.kept.entries()) {
    const double ln_q = row.ln_q(entry, saved);
    double slope =
        c * (h_of(ln_q, entry.ln_p - ln_p_norm, saved.k_s, options) - std::exp(ln_q) * sum_h);
    if (ce != 0) slope += ce * (soft(row.logit(entry)) - hard(entry.id));
    out[entry.id] = from_wide<T>(W(slope));
  }
  if (ce == 0 || row.kept.holds(label)) return;
  const Entry at{label, 0};
  const double kd = off == 0 ? 0 : c * off * std::exp(row.ln_q(at, saved));
  out[label] = from_wide<T>(W(kd + ce * (soft(row.logit(at)) - 1.0)));
}

}  // namespace topk
}  // namespace deepfusion::inline DF_LEVEL
