// Rows and delta by themselves, where the joined calls do not serve.
#include "common/checks.h"
#include "view_aligned_attention/loss_rows.h"

namespace {

using namespace deepfusion;

constexpr const char* kOp = "view_aligned_attention";

bool loss_rows_cpu(Tensor offsets, Tensor target_offsets, std::optional<Tensor> mask,
                   std::optional<Tensor> target_mask, int64_t length, int64_t target_length,
                   int64_t width, std::vector<double> stage_weights, Tensor valid, Tensor scale,
                   Tensor factor) {
  return find_loss_rows(offsets, target_offsets, mask, target_mask, length, target_length, width,
                        stage_weights, valid, scale, factor);
}

// y and dy [S, B, Q, D] to delta [B, H, S Q].
void stage_attention_delta_cpu(Tensor y, Tensor dy, int64_t heads, Tensor delta) {
  DF_DISPATCH_FLOAT(y.scalar_type(), kOp, [&] { find_delta<scalar_t>(y, dy, heads, delta); });
}

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("loss_rows", TORCH_BOX(&loss_rows_cpu));
  m.impl("stage_attention_delta", TORCH_BOX(&stage_attention_delta_cpu));
}
