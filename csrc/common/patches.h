// Mean of the valid tokens of a patch, the pooled row that the projection and the loss both read,
// and its layer normalisation.
#pragma once

#include "common/cpu.h"

#include <algorithm>

namespace deepfusion::inline DF_LEVEL {

// Tokens [begin, end) of one sample, of which those with mask 0 (where there is a mask) do not
// count.
struct Patch {
  int64_t begin;
  int64_t end;
  const bool* mask;

  bool holds(int64_t token) const { return !mask || mask[token]; }
  int64_t count() const {
    int64_t valid = 0;
    for (int64_t token = begin; token < end; ++token) valid += holds(token);
    return valid;
  }
};

// offsets [B, Q+1], mask [B, L] or null: patch i of sample b.
inline Patch patch_at(const int32_t* offsets, const bool* mask, int64_t patches, int64_t length,
                      int64_t b, int64_t i) {
  const int32_t* row = offsets + b * (patches + 1);
  return {row[i], row[i + 1], mask ? mask + b * length : nullptr};
}

// mean[0 .. width) = mean of the patch's valid tokens, 0 without any.
template <typename T, typename W>
inline void pool_row(const T* tokens, int64_t token_stride, const Patch& patch, int64_t width,
                     W* mean) {
  std::fill_n(mean, width, W(0));
  int64_t count = 0;
  for (int64_t token = patch.begin; token < patch.end; ++token) {
    if (!patch.holds(token)) continue;
    ++count;
    const T* row = tokens + token * token_stride;
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) mean[c] += to_wide(row[c]);
  }
  if (count < 2) return;
  const W share = W(1) / static_cast<W>(count);
#pragma omp simd
  for (int64_t c = 0; c < width; ++c) mean[c] *= share;
}

constexpr double kNormEps = 1e-6;

// Layer normalisation without affine.
template <typename W>
inline void normalise(W* row, int64_t width) {
  W sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < width; ++c) sum += row[c];
  const W mean = sum / static_cast<W>(width);
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < width; ++c) squares += (row[c] - mean) * (row[c] - mean);
  const W scale = W(1) / std::sqrt(squares / static_cast<W>(width) + static_cast<W>(kNormEps));
#pragma omp simd
  for (int64_t c = 0; c < width; ++c) row[c] = (row[c] - mean) * scale;
}

}  // namespace deepfusion::inline DF_LEVEL
