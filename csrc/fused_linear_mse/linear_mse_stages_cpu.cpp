// The loss of several stages at once: what `fused_linear_mse` calls where rows are multiplied as
// they lie.
#include "common/checks.h"
#include "common/mse_stages.h"

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
      stage_errors(y, weight, bias,
                   {targets, offsets, mask ? mask->const_data_ptr<bool>() : nullptr, target_norm},
                   scale, {needs_y, needs_weight, needs_bias, false}, chunk_rows);
  return {found.sse, found.dy, found.dweight, found.dbias};
}

#endif

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("linear_mse_multiplies", TORCH_BOX(&linear_mse_multiplies_cpu));
#if defined(DF_LEVEL_avx512)
  m.impl("linear_mse_stages", TORCH_BOX(&linear_mse_stages_cpu));
#endif
}
