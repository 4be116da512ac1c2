// Tokens of a patch on CUDA: which it holds, and the mean of a column over those that count.
#pragma once

#include "common/cuda.cuh"

namespace deepfusion {
inline namespace device {

// Tokens [begin, end) of one sample, of which those with mask 0 (where there is a mask) do not
// count.
struct Patch {
  int begin, end;
  const bool* mask;

  __device__ __forceinline__ bool holds(int token) const { return !mask || mask[token]; }
  __device__ __forceinline__ int count() const {
    int valid = 0;
    for (int token = begin; token < end; ++token) valid += holds(token);
    return valid;
  }
};

// offsets [B, Q+1], mask [B, L] or null: patch i of sample b.
__device__ __forceinline__ Patch patch_at(const int32_t* offsets, const bool* mask, int64_t patches,
                                          int64_t length, int64_t b, int64_t i) {
  const int32_t* cut = offsets + b * (patches + 1) + i;
  return {cut[0], cut[1], mask ? mask + b * length : nullptr};
}

// Mean of one column over the patch's `count` valid tokens, 0 without any.
__device__ __forceinline__ float patch_mean(const void* tokens, int64_t stride, const Patch& patch,
                                            int count, int64_t column, Kind kind) {
  float sum = 0.0f;
  for (int token = patch.begin; token < patch.end; ++token)
    if (patch.holds(token)) sum += load1(tokens, token * stride + column, kind);
  return count > 1 ? sum / static_cast<float>(count) : sum;
}

}  // namespace device
}  // namespace deepfusion
