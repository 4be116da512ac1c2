// The k likeliest tokens of each row of a teacher's logits and their log-probabilities, in one
// sweep that widens 1024 columns at a time.
#include "common/checks.h"
#include "common/kl_row.h"
#include "common/logit_rows.h"

#include <tuple>
#include <vector>

namespace {

using namespace deepfusion;

template <typename W>
struct Candidate {
  W x;
  int64_t id;
  // larger first, of equal ones the smaller id
  bool operator<(const Candidate& other) const {
    return x > other.x || (x == other.x && id < other.id);
  }
};

// The k largest of what it has seen, at the front once settled.
template <typename W>
class Largest {
 public:
  explicit Largest(int64_t k) : k_(k) { candidates_.reserve(2 * k + 2 * kBlock); }

  void clear() {
    candidates_.clear();
    is_full_ = false;
  }

  void add(const Block<W>& block, int64_t begin, int64_t count) {
    if (is_full_ && block.max <= threshold_) return;
    for (int64_t v = 0; v < count; ++v) {
      // NOTE: NaN has no order; its row is NaN by its sum.
      const W x = block.x[v] == block.x[v] ? block.x[v] : W(kMissing);
      if (!is_full_ || x > threshold_) candidates_.push_back({x, begin + v});
    }
    if (static_cast<int64_t>(candidates_.size()) >= 2 * k_ + kBlock || !is_full_) settle();
  }

  const std::vector<Candidate<W>>& sorted() {
    settle();
    std::sort(candidates_.begin(), candidates_.end());
    return candidates_;
  }

 private:
  void settle() {
    if (static_cast<int64_t>(candidates_.size()) < k_) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + (k_ - 1), candidates_.end());
    candidates_.resize(k_);
    threshold_ = candidates_[k_ - 1].x;
    is_full_ = true;
  }

  int64_t k_;
  std::vector<Candidate<W>> candidates_;
  W threshold_ = W(kMissing);
  bool is_full_ = false;
};

template <typename W>
void select_row(const LogitRow<W>& row, int64_t columns, double inv_tau, Largest<W>& largest,
                int64_t* ids, W* logprobs) {
  alignas(64) W buffer[kBlock];
  ExpSum<double> all;
  largest.clear();
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t count = std::min(kBlock, columns - begin);
    const Block<W> block = load_block<W>(row, begin, count, buffer);
    all = merge(all, exp_sum(block, count, W(inv_tau)), inv_tau);
    largest.add(block, begin, count);
  }
  const double ln_l = log_sum(all);
  for (const Candidate<W>& at : largest.sorted()) {
    *ids++ = at.id;
    const bool is_missing = at.x <= W(kMissing) && ln_l == ln_l;
    *logprobs++ = static_cast<W>(is_missing ? -INFINITY : (at.x - all.m) * inv_tau - ln_l);
  }
}

std::tuple<Tensor, Tensor> topk_logprobs_cpu(const Tensor& logits, int64_t k, double temperature) {
  check_shape(logits, "topk_logprobs", "logits", "[1, T, V]", {1, -1, -1});
  check_dense_rows(logits, "topk_logprobs", "logits");
  const LogitRows rows(logits, false);
  const int64_t T = logits.size(1);
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  Tensor ids = torch::stable::new_empty(logits, {T, k}, ScalarType::Long);
  Tensor logprobs =
      torch::stable::new_empty(logits, {T, k}, is_double ? ScalarType::Double : ScalarType::Float);
  const auto run = [&](auto zero) {
    using W = decltype(zero);
    int64_t* id = ids.mutable_data_ptr<int64_t>();
    W* logprob = logprobs.mutable_data_ptr<W>();
    torch::stable::parallel_for(0, T, 1, [&](int64_t begin, int64_t end) {
      Largest<W> largest(k);
      for (int64_t t = begin; t < end; ++t)
        select_row<W>({rows.row(t), rows.dtype}, rows.V, 1 / temperature, largest, id + t * k,
                      logprob + t * k);
    });
  };
  is_double ? run(0.0) : run(0.0f);
  return {ids, logprobs};
}

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("topk_logprobs", TORCH_BOX(&topk_logprobs_cpu));
}
