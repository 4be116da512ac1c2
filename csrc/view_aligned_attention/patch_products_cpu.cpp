// The projection by itself: what `patch_projection` calls where rows are multiplied as they lie.
#include "view_aligned_attention/patch_products.h"

namespace {

using namespace deepfusion;

constexpr const char* kOp = "view_aligned_attention";

bool multiplies_rows_cpu(const Tensor& like) {
  bool multiplies = false;
  DF_DISPATCH_FLOAT(like.scalar_type(), kOp, [&] { multiplies = multiplies_rows<scalar_t>(); });
  return multiplies;
}

#if defined(DF_LEVEL_avx512)

bool reads_in_place_cpu(const Tensor& mask, int64_t patch_size) {
  return reads_in_place(mask, patch_size);
}

void project_patches_cpu(std::vector<Tensor> stages, const Tensor& weight, const Tensor& bias,
                         std::optional<Tensor> position, std::optional<Tensor> stage,
                         const Tensor& offsets, std::optional<Tensor> mask, int64_t patch_size,
                         Tensor x) {
  const Cut cut = cut_of(stages, offsets, mask, patch_size);
  if (weight.scalar_type() == ScalarType::Float)
    project<float>(cut, Rows<float>(cut), weight, bias, position, stage, x);
  else
    project<BFloat16>(cut, Rows<BFloat16>(cut), weight, bias, position, stage, x);
}

// dF of every stage, then dW.
std::vector<Tensor> project_patches_backward_cpu(std::vector<Tensor> stages, const Tensor& weight,
                                                 const Tensor& dx, const Tensor& offsets,
                                                 std::optional<Tensor> mask, int64_t patch_size,
                                                 std::vector<int64_t> needs, bool needs_weight) {
  const Cut cut = cut_of(stages, offsets, mask, patch_size);
  KeptGroup of_stages(bytes_of_stages(cut, needs)), memory(needs_weight ? bytes_like(weight) : 0);
  return weight.scalar_type() == ScalarType::Float
             ? projection_gradients<float>(cut, weight, dx, needs, needs_weight, nullptr, of_stages,
                                           memory)
             : projection_gradients<BFloat16>(cut, weight, dx, needs, needs_weight, nullptr,
                                              of_stages, memory);
}

#endif

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("multiplies_rows", TORCH_BOX(&multiplies_rows_cpu));
#if defined(DF_LEVEL_avx512)
  m.impl("reads_in_place", TORCH_BOX(&reads_in_place_cpu));
  m.impl("project_patches", TORCH_BOX(&project_patches_cpu));
  m.impl("project_patches_backward", TORCH_BOX(&project_patches_backward_cpu));
#endif
}
