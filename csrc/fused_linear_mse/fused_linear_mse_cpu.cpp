// From predictions without bias to errors and their gradient, in one pass over rows that lie in the
// cache:
//
//   R_n = p_n + u - G_n      sse_n = |R_n|^2      p_n <- 2 c_n R_n         G_n pooled from the
//   target's tokens
//
// A row of scale c_n = 0 becomes 0 and its target is not read.
#include "common/checks.h"
#include "common/patches.h"

#include <vector>

namespace {

using namespace deepfusion;
using torch::stable::Tensor;

// sse of the row; the row becomes its gradient.
template <typename W, typename T>
W error_row(W* row, const W* goal, const T* bias, W scale, int64_t width) {
  W sse = 0;
#pragma omp simd reduction(+ : sse)
  for (int64_t c = 0; c < width; ++c) {
    const W error = row[c] + (bias ? to_wide(bias[c]) : W(0)) - goal[c];
    sse += error * error;
    row[c] = 2 * scale * error;
  }
  return sse;
}

template <typename T>
void epilogue(Tensor& predictions, const T* bias, const Tensor& target, const Tensor& offsets,
              const bool* mask, const Tensor& scale, Tensor& sse, int64_t first, bool target_norm) {
  using W = wide_t<T>;
  const int64_t rows = predictions.size(0), width = predictions.size(1),
                patches = offsets.size(1) - 1;
  const int64_t length = target.size(1), sample_stride = target.stride(0),
                token_stride = target.stride(1);
  W* prediction = predictions.mutable_data_ptr<W>();
  W* sums = sse.mutable_data_ptr<W>();
  const W* scales = scale.const_data_ptr<W>();
  const T* tokens = target.const_data_ptr<T>();
  const int32_t* cuts = offsets.const_data_ptr<int32_t>();
  torch::stable::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    std::vector<W> goal(width);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = first + r, b = n / patches, i = n % patches;
      W* row = prediction + r * width;
      if (scales[n] == 0) {
        std::fill_n(row, width, W(0));
        sums[n] = 0;
        continue;
      }
      pool_row(tokens + b * sample_stride, token_stride,
               patch_at(cuts, mask, patches, length, b, i), width, goal.data());
      if (target_norm) normalise(goal.data(), width);
      sums[n] = error_row(row, goal.data(), bias, scales[n], width);
    }
  });
}

void linear_mse_epilogue_cpu(Tensor predictions, std::optional<Tensor> bias, Tensor target,
                             Tensor offsets, std::optional<Tensor> mask, Tensor scale, Tensor sse,
                             int64_t first, bool target_norm) {
  check_dense_rows(target, "fused_linear_mse", "target");
  const bool* valid = mask ? mask->const_data_ptr<bool>() : nullptr;
  DF_DISPATCH_FLOAT(target.scalar_type(), "fused_linear_mse", [&] {
    const scalar_t* u = bias ? bias->const_data_ptr<scalar_t>() : nullptr;
    epilogue<scalar_t>(predictions, u, target, offsets, valid, scale, sse, first, target_norm);
  });
}

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("linear_mse_epilogue", TORCH_BOX(&linear_mse_epilogue_cpu));
}
