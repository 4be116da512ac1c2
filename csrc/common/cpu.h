// Rows in parallel, widening loads, and an exponential that the compiler vectorises.
#pragma once

#include "common/cpu_level.h"
#include "common/types.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace deepfusion::inline DF_LEVEL {

// e^x in float32 to 1 unit in the last place or so, for x <= 88; 0 below -87.3, and NaN stays NaN.
// Cody-Waite reduction by ln 2 in two parts, then a degree-6 polynomial (minimax on [-ln2/2, ln2/2]).
inline float exp_fast(float x) {
  const float clamped = x < -87.33654f ? -87.33654f : (x > 88.37626f ? 88.37626f : x);
  const float n = std::nearbyintf(clamped * 1.44269504088896341f);
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1.0f;
  const float scaled = y * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  return x < -87.33654f ? 0.0f : (x > 88.37626f ? std::numeric_limits<float>::infinity() : (x == x ? scaled : x));
}

inline double exp_fast(double x) { return std::exp(x); }

inline float to_wide(float x) { return x; }
inline double to_wide(double x) { return x; }
inline float to_wide(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }
inline float to_wide(Half x) { return static_cast<float>(x); }

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
