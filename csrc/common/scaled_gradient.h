// A gradient that was formed with the loss, times what only backward knows.
#pragma once

#include "common/kept_group.h"

namespace deepfusion::inline DF_LEVEL {

// gradient * g, rounded once, of the dtype of `like`.
template <typename From, typename To>
Tensor scaled(const Tensor& gradient, float g, const Tensor& like, KeptGroup& memory) {
  const int64_t numel = gradient.numel();
  Tensor out = memory.empty(like, {gradient.sizes().begin(), gradient.sizes().end()});
  const From* from = gradient.const_data_ptr<From>();
  To* to = out.mutable_data_ptr<To>();
  torch::stable::parallel_for(0, numel, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = from_wide<To>(to_wide(from[i]) * g);
  });
  return out;
}

}  // namespace deepfusion::inline DF_LEVEL
