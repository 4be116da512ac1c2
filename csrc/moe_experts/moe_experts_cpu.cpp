// Entry points of moe_experts: the plan, memory, and the choice of the operand type.
#include "common/moe_plan.h"
#include "moe_experts/backward.h"
#include "moe_experts/forward.h"

#include <tuple>
#include <vector>

namespace {

using namespace deepfusion;

// body(S()) for the type in which factors of dtype T are multiplied on this processor.
template <typename T, typename Body>
void with_factor(const Body& body) {
  if constexpr (std::is_same_v<T, double>) {
    body(double());
  } else {
#if defined(DF_LEVEL_avx512)
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (multiplies_bfloat16()) return body(BFloat16());
    }
#endif
    body(float());
  }
}

Sizes sizes_of(const Tensor& hidden, const Tensor& gate_up, const Tensor& down,
               const Tensor& slots) {
  const Sizes size{hidden.size(0), slots.size(1), hidden.size(1), down.size(2), gate_up.size(0)};
  check_shape(gate_up, "moe_experts", "gate_up_proj", "[E, 2F, D]", {size.E, 2 * size.F, size.D});
  check_shape(down, "moe_experts", "down_proj", "[E, D, F]", {size.E, size.D, size.F});
  check_shape(slots, "moe_experts", "experts", "[T, K]", {size.T, size.K});
  return size;
}

template <typename T, typename S>
Experts<T, S> experts_of(Sizes size, int64_t activation, const Tensor& x, const Tensor& gate_up,
                         const Tensor& down, const Tensor& order, const Tensor& slots,
                         const Tensor& offsets, Scratch<int32_t>& token) {
  const int32_t* slot_of = order.const_data_ptr<int32_t>();
  // a division a row, once
  for (int64_t r = 0; r < size.rows(); ++r)
    token.of(0)[r] = static_cast<int32_t>(slot_of[r] / size.K);
  return {size,
          static_cast<Activation>(activation),
          gate_up.const_data_ptr<T>(),
          down.const_data_ptr<T>(),
          x.const_data_ptr<S>(),
          x.size(1),
          order.const_data_ptr<int32_t>(),
          slots.const_data_ptr<int32_t>(),
          offsets.const_data_ptr<int32_t>(),
          token.of(0)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_experts_forward_cpu(
    const Tensor& hidden, const Tensor& gate_up, const Tensor& down, const Tensor& experts,
    const Tensor& weights, int64_t activation) {
  const Sizes size = sizes_of(hidden, gate_up, down, experts);
  Tensor order = torch::stable::new_empty(experts, {size.rows()}, ScalarType::Int);
  Tensor slots = torch::stable::new_empty(experts, {size.T, size.K}, ScalarType::Int);
  Tensor offsets = torch::stable::new_empty(experts, {size.E + 1}, ScalarType::Int);
  const auto plan = [&](const auto* ids) {
    moe_plan(ids, size.rows(), size.E, order.mutable_data_ptr<int32_t>(),
             slots.mutable_data_ptr<int32_t>(), offsets.mutable_data_ptr<int32_t>());
  };
  if (experts.scalar_type() == ScalarType::Long) {
    plan(experts.const_data_ptr<int64_t>());
  } else {
    plan(experts.const_data_ptr<int32_t>());
  }
  Tensor out = torch::stable::new_empty(hidden, {size.T, size.D});
  const int64_t bytes = hidden.element_size();
  Tensor h = kept_empty(hidden, {size.rows(), 2 * size.F}, hidden.scalar_type(), bytes);
  Scratch<int32_t> token(order, 1, size.rows());
  DF_DISPATCH_FLOAT(hidden.scalar_type(), "moe_experts", [&] {
    with_factor<scalar_t>([&](auto factor) {
      using S = decltype(factor);
      const Tensor x = as_factor<S>(hidden);
      const Tensor wide = torch::stable::to(weights, kDtype<wide_t<scalar_t>>);
      const auto e =
          experts_of<scalar_t, S>(size, activation, x, gate_up, down, order, slots, offsets, token);
      run_forward(e, hidden, wide, h.mutable_data_ptr<scalar_t>(),
                  out.mutable_data_ptr<scalar_t>());
    });
  });
  return {out, h, order, slots, offsets};
}

// The wanted ones of dhidden, dgate_up, ddown, dweights, in this order.
std::vector<Tensor> moe_experts_backward_cpu(const Tensor& dout, const Tensor& hidden,
                                             const Tensor& gate_up, const Tensor& down,
                                             const Tensor& weights, const Tensor& h,
                                             const Tensor& order, const Tensor& slots,
                                             const Tensor& offsets, int64_t activation,
                                             bool needs_dhidden, bool needs_dgate_up,
                                             bool needs_ddown, bool needs_dweights) {
  const Sizes size = sizes_of(hidden, gate_up, down, slots);
  std::vector<Tensor> wanted;
  const auto want = [&](bool needed, const Tensor& like) {
    if (!needed) return static_cast<void*>(nullptr);
    const auto shape = like.sizes();
    wanted.push_back(
        kept_empty(like, {shape.begin(), shape.end()}, like.scalar_type(), like.element_size()));
    return wanted.back().mutable_data_ptr();
  };
  void* dhidden = want(needs_dhidden, hidden);
  void* dgate_up = want(needs_dgate_up, gate_up);
  void* ddown = want(needs_ddown, down);
  Scratch<int32_t> token(order, 1, size.rows());
  DF_DISPATCH_FLOAT(hidden.scalar_type(), "moe_experts", [&] {
    with_factor<scalar_t>([&](auto factor) {
      using S = decltype(factor);
      using T = scalar_t;
      const Tensor x = as_factor<S>(hidden);
      const Tensor wide = torch::stable::to(weights, kDtype<wide_t<T>>);
      const auto e =
          experts_of<T, S>(size, activation, x, gate_up, down, order, slots, offsets, token);
      Tensor dweights = torch::stable::new_zeros(wide, {size.T, size.K});
      run_backward(e, as_factor<S>(dout), wide, h, static_cast<T*>(dhidden),
                   static_cast<T*>(dgate_up), static_cast<T*>(ddown), dweights);
      if (needs_dweights) wanted.push_back(torch::stable::to(dweights, weights.scalar_type()));
    });
  });
  return wanted;
}

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("moe_experts_forward", TORCH_BOX(&moe_experts_forward_cpu));
  m.impl("moe_experts_backward", TORCH_BOX(&moe_experts_backward_cpu));
}
