// The attention by itself, what `multi_stage_attention` calls: with its products in one call each
// way where rows are multiplied as they lie, else between the library's.
#include "common/checks.h"
#include "common/kept_group.h"
#include "view_aligned_attention/attention.h"
#include "view_aligned_attention/loss_rows.h"
#include "view_aligned_attention/qkv_products.h"

namespace {

using namespace deepfusion;

constexpr const char* kOp = "multi_stage_attention";

// y [J, B, Q, D] and lse [B, H, P] are written.
void stage_attention_forward_cpu(Tensor qkv, std::optional<Tensor> valid, int64_t heads,
                                 bool causal, double scale, Tensor y, Tensor lse) {
  DF_DISPATCH_FLOAT(qkv.scalar_type(), kOp, [&] {
    forward_heads<scalar_t>(qkv, valid, heads, causal, scale, y.mutable_data_ptr<scalar_t>(), lse);
  });
}

// dqkv [J, B, Q, 3 D] = upstream times the gradient of dy.
void stage_attention_backward_cpu(Tensor qkv, Tensor lse, Tensor dy, Tensor delta,
                                  std::optional<Tensor> valid, int64_t heads, bool causal,
                                  double scale, Tensor upstream, Tensor dqkv) {
  DF_DISPATCH_FLOAT(qkv.scalar_type(), kOp, [&] {
    using W = wide_t<scalar_t>;
    Gradients<scalar_t> of;
    of.qkv = qkv.const_data_ptr<scalar_t>();
    of.dy = dy.const_data_ptr<scalar_t>();
    of.lse = lse.const_data_ptr<W>();
    of.delta = delta.const_data_ptr<W>();
    of.upstream = *upstream.const_data_ptr<W>();
    of.dqkv = dqkv.mutable_data_ptr<scalar_t>();
    backward_heads(qkv, valid, heads, causal, scale, of);
  });
}

#if defined(DF_LEVEL_avx512)

// A tensor of its own: who keeps one result does not keep the others.
Tensor own(const Tensor& like, const std::vector<int64_t>& sizes) {
  int64_t bytes = like.element_size();
  for (int64_t size : sizes) bytes *= size;
  return KeptGroup(KeptGroup::room(bytes)).empty(like, sizes);
}

// x [J, B, Q, D], its last axis dense, to Y and QKV of its order and L [B, H, P].
std::tuple<Tensor, Tensor, Tensor> attention_forward_cpu(const Tensor& x, const Tensor& weight,
                                                         std::optional<Tensor> bias,
                                                         std::optional<Tensor> valid, int64_t heads,
                                                         bool causal, double scale) {
  check_dense_rows(x, kOp, "features");
  const int64_t J = x.size(0), B = x.size(1), Q = x.size(2), D = x.size(3);
  Tensor y = own(weight, {J, B, Q, D}), qkv = own(weight, {J, B, Q, 3 * D}),
         lse = torch::stable::new_empty(weight, {B, heads, J * Q}, ScalarType::Float);
  for_type(weight, [&]<typename T>(T) {
    project_qkv<T>(x, weight, bias ? bias->const_data_ptr<T>() : nullptr,
                   qkv.mutable_data_ptr<T>());
    forward_heads<T>(qkv, valid, heads, causal, scale, y.mutable_data_ptr<T>(), lse);
  });
  return {y, qkv, lse};
}

// dX, dWqkv and their bias's gradient; what is not needed is an empty tensor.
std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& dy, const Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& qkv,
    const Tensor& lse, std::optional<Tensor> valid, int64_t heads, bool causal, double scale,
    bool needs_x, bool needs_weight, bool needs_bias) {
  check_dense_rows(x, kOp, "features");
  const int64_t J = x.size(0), B = x.size(1), Q = x.size(2), D = x.size(3);
  const auto nothing = [&] { return torch::stable::new_empty(weight, {0}); };
  Tensor dx = needs_x ? own(weight, {J, B, Q, D}) : nothing(),
         dweight = needs_weight ? own(weight, {3 * D, D}) : nothing(),
         dbias = needs_bias ? own(weight, {3 * D}) : nothing();
  Tensor delta = torch::stable::new_empty(lse, {B, heads, J * Q}),
         dqkv = own(weight, {J, B, Q, 3 * D});
  for_type(weight, [&]<typename T>(T) {
    find_delta<T>(y, dy, heads, delta);
    backward_heads<T>(qkv, valid, heads, causal, scale,
                      {qkv.const_data_ptr<T>(), dy.const_data_ptr<T>(), lse.const_data_ptr<float>(),
                       delta.const_data_ptr<float>(), 1.0f, dqkv.mutable_data_ptr<T>()});
    const T* rows = dqkv.const_data_ptr<T>();
    if (needs_x) find_dx<T>(rows, weight, dx);
    if (needs_weight) find_dqkv_weight<T>(rows, x, dweight.mutable_data_ptr<T>());
    if (needs_bias) sum_columns<T>(rows, 3 * D, J * B * Q, dbias.mutable_data_ptr<T>());
  });
  return {dx, dweight, dbias};
}

#endif

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("stage_attention_forward", TORCH_BOX(&stage_attention_forward_cpu));
  m.impl("stage_attention_backward", TORCH_BOX(&stage_attention_backward_cpu));
#if defined(DF_LEVEL_avx512)
  m.impl("attention_forward", TORCH_BOX(&attention_forward_cpu));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cpu));
#endif
}
