// What `fused_linear_mse` calls where rows are multiplied as they lie: the errors of several stages
// at once, or one stage whole.
//
//   loss = factor sum_n w_n |R_n|^2        factor = 1 / (M sum w), 0 if nothing counts; or 1
#include "common/checks.h"
#include "common/mse_stages.h"
#include "common/patch_tables.h"
#include "common/scaled_gradient.h"

namespace {

using namespace deepfusion;

constexpr const char* kOp = "fused_linear_mse";

bool linear_mse_multiplies_cpu(const Tensor& like) {
  bool multiplies = false;
  DF_DISPATCH_FLOAT(like.scalar_type(), kOp, [&] { multiplies = multiplies_rows<scalar_t>(); });
  return multiplies;
}

#if defined(DF_LEVEL_avx512)

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_mse_stages_cpu(
    const Tensor& y, const Tensor& weight, std::optional<Tensor> bias, std::vector<Tensor> targets,
    const Tensor& offsets, std::optional<Tensor> mask, const Tensor& scale, bool target_norm,
    int64_t chunk_rows, bool needs_y, bool needs_weight, bool needs_bias) {
  for (const Tensor& target : targets) check_dense_rows(target, kOp, "target");
  const StageErrors found =
      stage_errors(y, weight, bias, {targets, offsets, mask_of(mask), target_norm}, scale,
                   {needs_y, needs_weight, needs_bias, false}, chunk_rows);
  return {found.sse, found.dy, found.dweight, found.dbias};
}

// w [N]: 1 or the given weight where the patch holds a valid token, else 0.
Tensor row_weights(const Tensor& offsets, const std::optional<Tensor>& mask,
                   const std::optional<Tensor>& given, int64_t length) {
  const int64_t patches = offsets.size(1) - 1, rows = offsets.size(0) * patches;
  Tensor weights = torch::stable::new_empty(offsets, {rows}, ScalarType::Float);
  const int32_t* cuts = offsets.const_data_ptr<int32_t>();
  const float* w = given ? given->const_data_ptr<float>() : nullptr;
  float* to = weights.mutable_data_ptr<float>();
  for (int64_t n = 0; n < rows; ++n) {
    const Patch patch = patch_at(cuts, mask_of(mask), patches, length, n / patches, n % patches);
    to[n] = !holds_any(patch) ? 0.0f : w ? w[n] : 1.0f;
  }
  return weights;
}

// loss, factor, dy, dweight, dbias, the gradients those of the sum; nothing at all where the table
// must be refused.
std::vector<Tensor> linear_mse_loss_cpu(const Tensor& y, const Tensor& weight,
                                        std::optional<Tensor> bias, Tensor target,
                                        const Tensor& offsets, std::optional<Tensor> mask,
                                        std::optional<Tensor> given, bool is_mean, bool target_norm,
                                        int64_t chunk_rows, bool needs_y, bool needs_weight,
                                        bool needs_bias) {
  check_dense_rows(target, kOp, "target");
  if (!is_table(offsets, target.size(1))) return {};
  const Tensor weights = row_weights(offsets, mask, given, target.size(1));
  const std::vector<Tensor> targets{target};
  const StageErrors found =
      stage_errors(y, weight, bias, {targets, offsets, mask_of(mask), target_norm}, weights,
                   {needs_y, needs_weight, needs_bias, false}, chunk_rows);
  const float *w = weights.const_data_ptr<float>(), *sse = found.sse.const_data_ptr<float>();
  double total = 0, all = 0;
  for (int64_t n = 0; n < weights.numel(); ++n) {
    total += double{w[n]} * sse[n];
    all += w[n];
  }
  Tensor loss = torch::stable::new_empty(weights, {}), factor = torch::stable::new_empty(loss, {});
  const double mean = all > 0 ? 1 / (static_cast<double>(weight.size(0)) * all) : 0;
  const float share = is_mean ? static_cast<float>(mean) : 1.0f;
  *factor.mutable_data_ptr<float>() = share;
  *loss.mutable_data_ptr<float>() = static_cast<float>(total * share);
  return {loss, factor, found.dy, found.dweight, found.dbias};
}

std::tuple<Tensor, Tensor, Tensor> linear_mse_scaled_cpu(const Tensor& upstream,
                                                         const Tensor& factor, const Tensor& dy,
                                                         const Tensor& dweight, const Tensor& dbias,
                                                         const Tensor& like) {
  const float g = *upstream.const_data_ptr<float>() * *factor.const_data_ptr<float>();
  const auto call = [&]<typename T>(T) -> std::tuple<Tensor, Tensor, Tensor> {
    KeptGroup of_y(KeptGroup::room(dy.numel() * int64_t{sizeof(T)})),
        of_head(KeptGroup::room(dweight.numel() * int64_t{sizeof(T)}) +
                KeptGroup::room(dbias.numel() * int64_t{sizeof(T)}));
    return {scaled<T, T>(dy, g, like, of_y), scaled<float, T>(dweight, g, like, of_head),
            scaled<float, T>(dbias, g, like, of_head)};
  };
  return like.scalar_type() == ScalarType::Float ? call(float()) : call(BFloat16());
}

#endif

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("linear_mse_multiplies", TORCH_BOX(&linear_mse_multiplies_cpu));
#if defined(DF_LEVEL_avx512)
  m.impl("linear_mse_stages", TORCH_BOX(&linear_mse_stages_cpu));
  m.impl("linear_mse_loss", TORCH_BOX(&linear_mse_loss_cpu));
  m.impl("linear_mse_scaled", TORCH_BOX(&linear_mse_scaled_cpu));
#endif
}
