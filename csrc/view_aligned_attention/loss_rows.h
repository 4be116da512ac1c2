// Small passes of the joined loss that would otherwise be a dozen library calls each.
//
//   v_bi = both sides hold a valid token in patch i of sample b      c_jn = s_j v_n
//   factor = 1 / (M sum v), 0 if nothing counts      delta = rowsum(dY * Y) per head
#pragma once

#include "common/patch_tables.h"

#include <optional>
#include <vector>

namespace deepfusion::inline DF_LEVEL {

using torch::stable::Tensor;

// Tables and masks contiguous; valid [B, Q], scale [S, B Q] and factor [] are written. False, and
// nothing written, for tables that are none.
inline bool find_loss_rows(const Tensor& offsets, const Tensor& target_offsets,
                           const std::optional<Tensor>& mask,
                           const std::optional<Tensor>& target_mask, int64_t length,
                           int64_t target_length, int64_t width,
                           const std::vector<double>& stage_weights, Tensor& valid, Tensor& scale,
                           Tensor& factor) {
  if (!is_table(offsets, length) || !is_table(target_offsets, target_length)) return false;
  bool* v = valid.mutable_data_ptr<bool>();
  mark_valid(offsets, mask_of(mask), length, true, v);
  const int64_t count = mark_valid(target_offsets, mask_of(target_mask), target_length, false, v);
  const int64_t rows = valid.numel();
  DF_DISPATCH_FLOAT(scale.scalar_type(), "view_aligned_attention", [&] {
    using W = wide_t<scalar_t>;
    W* c = scale.mutable_data_ptr<W>();
    for (double weight : stage_weights)
      for (int64_t n = 0; n < rows; ++n) *c++ = v[n] ? static_cast<W>(weight) : W(0);
    const W all = static_cast<W>(width) * static_cast<W>(count);
    *factor.mutable_data_ptr<W>() = count ? W(1) / all : W(0);
  });
  return true;
}

template <typename T>
void find_delta(const Tensor& y, const Tensor& dy, int64_t heads, Tensor& delta) {
  using W = wide_t<T>;
  const int64_t batch = y.size(1), patches = y.size(2), dim = y.size(3), width = dim / heads;
  const int64_t tokens = y.size(0) * patches;
  const T *rows = y.const_data_ptr<T>(), *drows = dy.const_data_ptr<T>();
  W* out = delta.mutable_data_ptr<W>();
  for_rows(y.size(0) * batch * patches, 64, [&](int64_t r) {
    const int64_t i = r % patches, b = r / patches % batch, p = r / patches / batch * patches + i;
    const T *row = rows + r * dim, *drow = drows + r * dim;
    for (int64_t h = 0; h < heads; ++h) {
      W sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = h * width; c < (h + 1) * width; ++c)
        sum += to_wide(row[c]) * to_wide(drow[c]);
      out[(b * heads + h) * tokens + p] = sum;
    }
  });
}

}  // namespace deepfusion::inline DF_LEVEL
