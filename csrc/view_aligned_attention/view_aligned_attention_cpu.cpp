// The attention by itself: what `multi_stage_attention` calls.
#include "common/checks.h"
#include "view_aligned_attention/attention.h"

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

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("stage_attention_forward", TORCH_BOX(&stage_attention_forward_cpu));
  m.impl("stage_attention_backward", TORCH_BOX(&stage_attention_backward_cpu));
}
