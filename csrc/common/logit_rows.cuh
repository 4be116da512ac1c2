// Rows of logits [A, B, V] of any two- or four-byte float on CUDA, eight columns a thread.
#pragma once

#include "common/kl_math.h"

namespace deepfusion {
inline namespace device {

// [A, B, V] by two row strides, in elements; row t = a B + b.
struct Side {
  void* data = nullptr;
  Kind kind = Kind::kFloat;
  int32_t V = 0;
  int64_t B = 1, stride_a = 0, stride_b = 0;

  __device__ char* row(int64_t t) const {
    return static_cast<char*>(data) + ((t / B) * stride_a + (t % B) * stride_b) * bytes_of(kind);
  }
};

// Eight columns; those outside the row are missing.
__device__ __forceinline__ void load_columns(const void* row, int32_t first, int32_t end, Kind kind,
                                             bool aligned, float (&out)[kLane]) {
  if (aligned && first + kLane <= end) {
    load8(row, first, kind, out);
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i)
      out[i] = first + i < end ? load1(row, first + i, kind) : kMissing;
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) out[i] = clean(out[i]);
}

__device__ __forceinline__ void store_columns(void* row, int32_t first, int32_t end, Kind kind,
                                              bool aligned, const float (&values)[kLane]) {
  if (aligned && first + kLane <= end) {
    store8(row, first, kind, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    if (first + i < end) store1(row, first + i, kind, values[i]);
  }
}

}  // namespace device
}  // namespace deepfusion
