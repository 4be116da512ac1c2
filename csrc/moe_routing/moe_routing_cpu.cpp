// Router of a mixture of experts: every row once forward, once backward, weights and losses
// together; moe_routing_row.h has the formulas.
//
// Losses are summed in blocks whose number depends on T alone, so threads never change a bit.
#include "common/checks.h"
#include "moe_routing/moe_routing_row.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace deepfusion::inline DF_LEVEL {
namespace {

constexpr int64_t kMaxBlocks = 64, kMinRows = 32;

// Sums of one block of rows, added up in the order of the blocks.
struct Partial {
  std::vector<double> score;
  std::vector<int64_t> counts;
  double squares = 0;
};

template <typename W>
struct ForwardOut {
  W *weights, *picked, *lse, *mass;
  int64_t* experts;
};

template <typename T, typename W>
void route_block(const T* logits, const W* bias, int64_t begin, int64_t end, int64_t num_experts,
                 const Options& o, const ForwardOut<W>& out, Partial& partial) {
  Scratch<W> row(num_experts, o);
  partial.counts.assign(num_experts, 0);
  partial.score.assign(o.balance != 0 ? num_experts : 0, 0.0);
  const bool needs_scores = o.needs_scores(bias != nullptr);
  for (int64_t t = begin; t < end; ++t) {
    const auto facts = read_row(logits + t * num_experts, num_experts, o, needs_scores, row);
    int64_t* experts = out.experts + t * o.top_k;
    choose(facts, bias, num_experts, o, row, experts);
    weigh(facts, experts, o, row, out.weights + t * o.top_k,
          o.is_sigmoid ? out.picked + t * o.top_k : nullptr);
    for (int64_t k = 0; k < o.top_k; ++k) ++partial.counts[experts[k]];
    if (o.needs_lse()) out.lse[t] = facts.lse;
    if (o.needs_mass()) out.mass[t] = facts.mass;
    if (o.z != 0) partial.squares += static_cast<double>(facts.lse) * facts.lse;
    if (o.balance == 0) continue;
    const W share = o.is_sigmoid ? W(1) / facts.mass : W(1);
    double* sums = partial.score.data();
    const W* s = row.scores.data();
#pragma omp simd
    for (int64_t e = 0; e < num_experts; ++e) sums[e] += static_cast<double>(s[e] * share);
  }
}

// counts and the loss, from the blocks in order.
double close(const std::vector<Partial>& partials, int64_t tokens, int64_t num_experts,
             const Options& o, int64_t* counts) {
  std::fill_n(counts, num_experts, int64_t{0});
  std::vector<double> score(num_experts, 0.0);
  double squares = 0, product = 0;
  for (const Partial& partial : partials) {
    for (int64_t e = 0; e < num_experts; ++e) counts[e] += partial.counts[e];
    for (size_t e = 0; e < partial.score.size(); ++e) score[e] += partial.score[e];
    squares += partial.squares;
  }
  if (tokens == 0) return 0;
  const double t = static_cast<double>(tokens);
  for (int64_t e = 0; e < num_experts; ++e) product += counts[e] / t * (score[e] / t);
  return o.balance * num_experts * product + o.z * (squares / t);
}

// weights, experts, counts, aux_loss; picked, lse and mass for the backward
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
void route_rows(const Tensor& x, const std::optional<Tensor>& bias, const Options& o,
                const Outputs& outputs) {
  using W = wide_t<T>;
  const auto& [weights, experts, counts, aux_loss, picked, lse, mass] = outputs;
  const int64_t tokens = x.size(0), num_experts = x.size(1);
  const int64_t rows = std::max(kMinRows, (tokens + kMaxBlocks - 1) / kMaxBlocks);
  std::vector<Partial> partials((tokens + rows - 1) / rows);
  const ForwardOut<W> out{weights.template mutable_data_ptr<W>(),
                          picked.template mutable_data_ptr<W>(), lse.template mutable_data_ptr<W>(),
                          mass.template mutable_data_ptr<W>(),
                          experts.template mutable_data_ptr<int64_t>()};
  const T* x_ptr = x.const_data_ptr<T>();
  const W* b_ptr = bias ? bias->const_data_ptr<W>() : nullptr;
  for_rows(static_cast<int64_t>(partials.size()), 1, [&](int64_t block) {
    route_block(x_ptr, b_ptr, block * rows, std::min(tokens, (block + 1) * rows), num_experts, o,
                out, partials[block]);
  });
  *aux_loss.template mutable_data_ptr<W>() = static_cast<W>(
      close(partials, tokens, num_experts, o, counts.template mutable_data_ptr<int64_t>()));
}

Outputs moe_route_forward_cpu(const Tensor& logits, const std::optional<Tensor>& bias,
                              int64_t top_k, int64_t num_groups, int64_t top_groups,
                              bool is_sigmoid, bool is_topk_first, bool renormalize,
                              bool is_top2_sum, double scale, double balance, double z) {
  const Options o{top_k,       num_groups,  top_groups, is_sigmoid, is_topk_first,
                  renormalize, is_top2_sum, scale,      balance,    z};
  Tensor x = torch::stable::contiguous(logits);
  const int64_t tokens = x.size(0), num_experts = x.size(1);
  const auto wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto make = [&](bool wanted) {
    return wanted ? torch::stable::new_empty(x, {tokens, top_k}, wide)
                  : torch::stable::new_empty(x, {0}, wide);
  };
  Tensor weights = make(true), picked = make(is_sigmoid);
  Tensor lse = torch::stable::new_empty(x, {o.needs_lse() ? tokens : 0}, wide);
  Tensor mass = torch::stable::new_empty(x, {o.needs_mass() ? tokens : 0}, wide);
  Tensor aux_loss = torch::stable::new_empty(x, {}, wide);
  Tensor experts = torch::stable::new_empty(x, {tokens, top_k}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(x, {num_experts}, ScalarType::Long);
  DF_DISPATCH_FLOAT(x.scalar_type(), "moe_route", [&] {
    route_rows<scalar_t>(x, bias, o, {weights, experts, counts, aux_loss, picked, lse, mass});
  });
  return {weights, experts, counts, aux_loss, picked, lse, mass};
}

template <typename T, typename W>
void route_row_backward(const T* logits, const BackwardIn<W>& in, int64_t t, int64_t num_experts,
                        const Options& o, Scratch<W>& row, T* dlogits) {
  W* dz = row.z.data();
  std::fill_n(dz, num_experts, W(0));
  const W dot = selected_gradient(in, t, o, row.dselected.data());
  const int64_t* experts = in.experts + t * o.top_k;
  for (int64_t k = 0; k < o.top_k; ++k) dz[experts[k]] = row.dselected[k];
  if (o.needs_lse()) {
    // choice is all zeros here: the pull of a loss that is not asked for, or not of this kind
    const W* pull = o.is_sigmoid ? row.choice.data() : in.pull;
    const W rest = o.z != 0 ? in.z_factor * in.lse[t] : W(0);
    const bool is_through_all = !o.is_sigmoid && !o.is_selected_softmax();
    add_softmax(logits + t * num_experts, pull, in.lse[t], rest, is_through_all ? dot : W(0),
                num_experts, row.scores.data(), dz);
  }
  if (o.needs_mass()) {
    add_sigmoid_balance(logits + t * num_experts, in.pull, in.mass[t], num_experts,
                        row.scores.data(), dz);
  }
  T* out = dlogits + t * num_experts;
#pragma omp simd
  for (int64_t e = 0; e < num_experts; ++e) out[e] = from_wide<T>(dz[e]);
}

// What the balance loss adds to dL/dP of each expert, over T.
template <typename W>
std::vector<W> balance_pull(const Options& o, const Tensor& counts, int64_t tokens, W daux) {
  const int64_t num_experts = counts.size(0);
  const int64_t* n = counts.const_data_ptr<int64_t>();
  std::vector<W> pull(num_experts, W(0));
  const double t = static_cast<double>(tokens);
  for (int64_t e = 0; e < num_experts && o.balance != 0; ++e) {
    pull[e] = static_cast<W>(daux * o.balance * num_experts * n[e] / (t * t));
  }
  return pull;
}

struct Saved {
  const Tensor dweights, logits;
  const Tensor &daux, &experts, &weights, &counts, &picked, &lse, &mass;
};

template <typename T>
void route_rows_backward(const Saved& saved, const Options& o, Tensor& dlogits) {
  using W = wide_t<T>;
  const int64_t tokens = dlogits.size(0), num_experts = dlogits.size(1);
  const W daux = *saved.daux.const_data_ptr<W>();
  const std::vector<W> pull = balance_pull(o, saved.counts, tokens, daux);
  const BackwardIn<W> in{
      saved.dweights.const_data_ptr<W>(),      saved.weights.const_data_ptr<W>(),
      saved.picked.const_data_ptr<W>(),        saved.lse.const_data_ptr<W>(),
      saved.mass.const_data_ptr<W>(),          pull.data(),
      saved.experts.const_data_ptr<int64_t>(), static_cast<W>(2 * daux * o.z / tokens)};
  const T* x = saved.logits.const_data_ptr<T>();
  T* out = dlogits.mutable_data_ptr<T>();
  // about 16k logits a task; not measured
  const int64_t grain = std::max<int64_t>(1, 16384 / num_experts);
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    Scratch<W> row(num_experts, o);
    for (int64_t t = begin; t < end; ++t) {
      route_row_backward(x, in, t, num_experts, o, row, out);
    }
  });
}

Tensor moe_route_backward_cpu(const Tensor& dweights, const Tensor& daux, const Tensor& logits,
                              const Tensor& experts, const Tensor& weights, const Tensor& counts,
                              const Tensor& picked, const Tensor& lse, const Tensor& mass,
                              int64_t top_k, int64_t num_groups, int64_t top_groups,
                              bool is_sigmoid, bool is_topk_first, bool renormalize,
                              bool is_top2_sum, double scale, double balance, double z) {
  const Options o{top_k,       num_groups,  top_groups, is_sigmoid, is_topk_first,
                  renormalize, is_top2_sum, scale,      balance,    z};
  const Saved saved{torch::stable::contiguous(dweights),
                    torch::stable::contiguous(logits),
                    daux,
                    experts,
                    weights,
                    counts,
                    picked,
                    lse,
                    mass};
  Tensor dlogits = torch::stable::new_empty(logits, {weights.size(0), counts.size(0)});
  DF_DISPATCH_FLOAT(logits.scalar_type(), "moe_route_backward",
                    [&] { route_rows_backward<scalar_t>(saved, o, dlogits); });
  return dlogits;
}

}  // namespace
}  // namespace deepfusion::inline DF_LEVEL

DF_REGISTER_CPU(m) {
  m.impl("moe_route_forward", TORCH_BOX(&deepfusion::moe_route_forward_cpu));
  m.impl("moe_route_backward", TORCH_BOX(&deepfusion::moe_route_backward_cpu));
}
