// Tables of patches: which are none, and which patches hold a token that counts.
#pragma once

#include "common/patches.h"

#include <optional>

namespace deepfusion::inline DF_LEVEL {

using torch::stable::Tensor;

// offsets [B, Q+1], within [0, length] and never falling.
inline bool is_table(const Tensor& offsets, int64_t length) {
  const int64_t cuts = offsets.size(1);
  const int32_t* row = offsets.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < offsets.size(0); ++b, row += cuts) {
    if (cuts > 0 && (row[0] < 0 || row[cuts - 1] > length)) return false;
    for (int64_t i = 1; i < cuts; ++i)
      if (row[i] < row[i - 1]) return false;
  }
  return true;
}

inline bool holds_any(const Patch& patch) {
  for (int64_t token = patch.begin; token < patch.end; ++token)
    if (patch.holds(token)) return true;
  return false;
}

// v of every patch, where both sides hold a token; returns their number.
inline int64_t mark_valid(const Tensor& offsets, const bool* mask, int64_t length, bool first,
                          bool* valid) {
  const int64_t patches = offsets.size(1) - 1;
  const int32_t* cuts = offsets.const_data_ptr<int32_t>();
  int64_t count = 0;
  for (int64_t n = 0; n < offsets.size(0) * patches; ++n) {
    const Patch patch = patch_at(cuts, mask, patches, length, n / patches, n % patches);
    valid[n] = (first || valid[n]) && holds_any(patch);
    count += valid[n];
  }
  return count;
}

inline const bool* mask_of(const std::optional<Tensor>& mask) {
  return mask ? mask->const_data_ptr<bool>() : nullptr;
}

}  // namespace deepfusion::inline DF_LEVEL
