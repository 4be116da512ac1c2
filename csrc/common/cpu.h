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
// In integers, since gcc 12 turns no loop of half conversions into vector code.
inline float to_wide(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.x & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.x & 0x7FFFu) << 13;
  const uint32_t tiny =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude + (113u << 23)) - 0x1p-14f);
  const uint32_t rebased = magnitude + ((magnitude < (0x7C00u << 13) ? 112u : 224u) << 23);
  return std::bit_cast<float>(sign | (magnitude < (0x0400u << 13) ? tiny : rebased));
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
// Round to nearest even: 65520 and above is infinity; below 2^-14 the unit is 2^-24 throughout.
template <>
inline Half from_wide<Half>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t tiny =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t huge = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < (113u << 23) ? tiny : normal;
  Half result;
  result.x = static_cast<uint16_t>((magnitude < (143u << 23) ? finite : huge) | (bits >> 31 << 15));
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
