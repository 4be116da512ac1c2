// Rows in parallel and widening loads; the exponential comes from vector_math.h.
#pragma once

#include "common/cpu_level.h"
#include "common/types.h"
#include "common/vector_math.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace deepfusion::inline DF_LEVEL {

inline float to_wide(float x) {
  return x;
}
inline double to_wide(double x) {
  return x;
}
inline float to_wide(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16);
}
inline float to_wide(Half x) {
  return static_cast<float>(x);
}

template <typename T>
inline T from_wide(float x) {
  return static_cast<T>(x);
}
template <typename T>
inline T from_wide(double x) {
  return static_cast<T>(x);
}
// Round to nearest even; NaN stays NaN.
template <>
inline BFloat16 from_wide<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  BFloat16 result;
  result.x = static_cast<uint16_t>(x == x ? rounded : 0x7FC0u);
  return result;
}

// body(row) for every row, rows shared out among the threads of torch's pool.
template <typename Body>
inline void for_rows(int64_t rows, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

}  // namespace deepfusion::inline DF_LEVEL
