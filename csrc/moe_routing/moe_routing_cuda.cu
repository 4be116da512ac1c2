// Router of a mixture of experts on CUDA: a warp a row, two launches forward, one backward. Sums go
// in a fixed order, and only whole numbers are counted by atomics.
#include "common/float_kind.h"
#include "common/torch_cuda.h"
#include "moe_routing/moe_routing_backward.cuh"
#include "moe_routing/moe_routing_forward.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>

namespace {

using namespace deepfusion;
using torch::headeronly::ScalarType;

// body(integral_constant) with the values a lane holds known when compiling.
template <typename Body>
void with_values(int64_t num_experts, const Body& body) {
  if (num_experts <= 64) return body(std::integral_constant<int, 2>());
  if (num_experts <= 128) return body(std::integral_constant<int, 4>());
  if (num_experts <= 256) return body(std::integral_constant<int, 8>());
  if (num_experts <= 512) return body(std::integral_constant<int, 16>());
  return body(std::integral_constant<int, 32>());
}

void check_logits(const Tensor& logits, int64_t num_experts, const char* op) {
  STD_TORCH_CHECK(1 <= num_experts && num_experts <= kMaxExperts, op,
                  ": router_logits must have 1 .. ", kMaxExperts, " experts on CUDA, got ",
                  num_experts);
  kind_of(logits, op, "router_logits");
}

// weights, experts, counts, aux_loss; picked, lse and mass for the backward
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs empty_outputs(const Tensor& x, const Options& o) {
  const int64_t tokens = x.size(0), num_experts = x.size(1);
  const auto floats = [&](bool wanted, bool by_slot) {
    if (!wanted) return torch::stable::new_empty(x, {0}, ScalarType::Float);
    if (!by_slot) return torch::stable::new_empty(x, {tokens}, ScalarType::Float);
    return torch::stable::new_empty(x, {tokens, o.top_k}, ScalarType::Float);
  };
  Tensor experts = torch::stable::new_empty(x, {tokens, o.top_k}, ScalarType::Long);
  const bool is_empty = tokens == 0;
  Tensor counts = is_empty ? torch::stable::new_zeros(x, {num_experts}, ScalarType::Long)
                           : torch::stable::new_empty(x, {num_experts}, ScalarType::Long);
  Tensor aux_loss = is_empty ? torch::stable::new_zeros(x, {}, ScalarType::Float)
                             : torch::stable::new_empty(x, {}, ScalarType::Float);
  return {floats(true, true),
          experts,
          counts,
          aux_loss,
          floats(o.is_sigmoid, true),
          floats(o.needs_lse(), false),
          floats(o.needs_mass(), false)};
}

ForwardCall describe(const Tensor& x, const std::optional<Tensor>& bias, const Options& o,
                     Outputs& outputs) {
  auto& [weights, experts, counts, aux_loss, picked, lse, mass] = outputs;
  ForwardCall call = {};
  call.logits = x.const_data_ptr();
  call.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  call.kind = kind_of(x, "moe_route", "router_logits");
  call.tokens = x.size(0);
  call.num_experts = static_cast<int32_t>(x.size(1));
  call.options = o;
  call.weights = weights.mutable_data_ptr<float>();
  call.picked = picked.mutable_data_ptr<float>();
  call.lse = lse.mutable_data_ptr<float>();
  call.mass = mass.mutable_data_ptr<float>();
  call.experts = experts.mutable_data_ptr<int64_t>();
  return call;
}

Outputs moe_route_forward_cuda(const Tensor& logits, const std::optional<Tensor>& bias,
                               int64_t top_k, int64_t num_groups, int64_t top_groups,
                               bool is_sigmoid, bool is_topk_first, bool renormalize,
                               bool is_top2_sum, double scale, double balance, double z) {
  const Options o{top_k,       num_groups,  top_groups, is_sigmoid, is_topk_first,
                  renormalize, is_top2_sum, scale,      balance,    z};
  check_shape(logits, "moe_route", "router_logits", "[T, E]", {-1, -1});
  torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Tensor x = torch::stable::contiguous(logits);
  const int64_t tokens = x.size(0), num_experts = x.size(1);
  check_logits(x, num_experts, "moe_route");
  Outputs outputs = empty_outputs(x, o);
  if (tokens == 0) return outputs;
  ForwardCall call = describe(x, bias, o, outputs);
  with_values(num_experts, [&](auto values) {
    constexpr int kValues = decltype(values)::value, kRows = warps_for(kValues);
    const int64_t blocks = std::min<int64_t>(kMaxBlocks, (tokens + kRows - 1) / kRows);
    const auto scratch = [&](int64_t count, ScalarType dtype) {
      return torch::stable::new_empty(x, {count}, dtype);
    };
    Tensor counts = scratch(blocks * num_experts, ScalarType::Int);
    Tensor scores = scratch(balance != 0 ? blocks * num_experts : 0, ScalarType::Float);
    Tensor squares = scratch(blocks, ScalarType::Float);
    call.counts = counts.mutable_data_ptr<int32_t>();
    call.scores = scores.mutable_data_ptr<float>();
    call.squares = squares.mutable_data_ptr<float>();
    const cudaStream_t stream = current_stream(x.get_device_index());
    route_forward_kernel<kValues>
        <<<static_cast<unsigned>(blocks), kRows * kWarp, 0, stream>>>(call);
    route_finish_kernel<<<1, kFinishThreads, 0, stream>>>(
        call, static_cast<int32_t>(blocks), std::get<2>(outputs).mutable_data_ptr<int64_t>(),
        std::get<3>(outputs).mutable_data_ptr<float>());
  });
  check_launch("moe_route");
  return outputs;
}

Tensor moe_route_backward_cuda(const Tensor& dweights, const Tensor& daux, const Tensor& logits,
                               const Tensor& experts, const Tensor& weights, const Tensor& counts,
                               const Tensor& picked, const Tensor& lse, const Tensor& mass,
                               int64_t top_k, int64_t num_groups, int64_t top_groups,
                               bool is_sigmoid, bool is_topk_first, bool renormalize,
                               bool is_top2_sum, double scale, double balance, double z) {
  const Options o{top_k,       num_groups,  top_groups, is_sigmoid, is_topk_first,
                  renormalize, is_top2_sum, scale,      balance,    z};
  const int64_t tokens = weights.size(0), num_experts = counts.size(0);
  check_logits(logits, num_experts, "moe_route_backward");
  torch::stable::accelerator::DeviceGuard guard(weights.get_device_index());
  Tensor dlogits = torch::stable::new_empty(logits, {tokens, num_experts});
  if (tokens == 0) return dlogits;
  const Tensor g = torch::stable::contiguous(dweights), x = torch::stable::contiguous(logits);
  BackwardCall call = {};
  call.dweights = g.const_data_ptr<float>();
  call.daux = daux.const_data_ptr<float>();
  call.weights = weights.const_data_ptr<float>();
  call.picked = picked.const_data_ptr<float>();
  call.lse = lse.const_data_ptr<float>();
  call.mass = mass.const_data_ptr<float>();
  call.logits = x.const_data_ptr();
  call.experts = experts.const_data_ptr<int64_t>();
  call.counts = counts.const_data_ptr<int64_t>();
  call.dlogits = dlogits.mutable_data_ptr();
  call.kind = kind_of(logits, "moe_route_backward", "router_logits");
  call.tokens = tokens;
  call.num_experts = static_cast<int32_t>(num_experts);
  call.options = o;
  const unsigned blocks = static_cast<unsigned>((tokens + kBackwardWarps - 1) / kBackwardWarps);
  const cudaStream_t stream = current_stream(weights.get_device_index());
  with_values(num_experts, [&](auto values) {
    route_backward_kernel<decltype(values)::value>
        <<<blocks, kBackwardWarps * kWarp, 0, stream>>>(call);
  });
  check_launch("moe_route_backward");
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepfusion_native, CUDA, m) {
  m.impl("moe_route_forward", TORCH_BOX(&moe_route_forward_cuda));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward_cuda));
}
