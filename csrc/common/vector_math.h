// Exponentials and logarithms written so that a loop over them becomes vector code; no torch
// header.
#pragma once

#include "common/cpu_level.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace deepfusion::inline DF_LEVEL {

// 1.5 * 2^23: adding it rounds a float to the nearest integer and leaves that integer in the low
// bits.
inline constexpr float kRoundingShift = 12582912.0f;
inline constexpr float kLog2E = 1.44269504088896341f;

struct ReducedExp {
  float r;          // x - n ln 2, in [-ln2/2, ln2/2]
  int32_t shifted;  // n << 23: what must be added to a float's bits to scale it by 2^n
};

// Cody-Waite: ln 2 in two parts, so that n ln 2 is exact in the first.
inline ReducedExp reduce_exp(float x) {
  const float rounded = x * kLog2E + kRoundingShift;
  const float n = rounded - kRoundingShift;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  return {r, static_cast<int32_t>(std::bit_cast<uint32_t>(rounded) << 23)};
}

// (e^r - 1 - r) / r^2 on [-ln2/2, ln2/2].
inline float exp_tail(float r) {
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  return p * r + 5.0000001201e-1f;
}

inline float scale_by_power(float y, int32_t shifted) {
  return std::bit_cast<float>(std::bit_cast<int32_t>(y) + shifted);
}

// e^x in float32 to 1 unit in the last place or so; 0 below -87, infinity above 88.37, and NaN
// stays NaN.
inline float exp_fast(float x) {
  const float clamped = x < -87.0f ? -87.0f : (x > 88.37626f ? 88.37626f : x);
  const ReducedExp reduced = reduce_exp(clamped);
  const float r = reduced.r;
  const float y = exp_tail(r) * r * r + r + 1.0f;
  const float scaled = scale_by_power(y, reduced.shifted);
  const float bounded = x > 88.37626f ? std::numeric_limits<float>::infinity() : scaled;
  return x < -87.0f ? 0.0f : (x == x ? bounded : x);
}

// e^x for x <= 0 up to rounding: one selection less.
inline float exp_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const ReducedExp reduced = reduce_exp(clamped);
  const float r = reduced.r;
  const float y = exp_tail(r) * r * r + r + 1.0f;
  // NOTE: the integer addition would turn a NaN into a number, hence the multiplication.
  const float scale = std::bit_cast<float>(reduced.shifted + 0x3F800000);
  return x < -87.0f ? 0.0f : y * scale;
}

// 2^(d k) for d k <= 0 up to rounding: 0 below 2^-126, and NaN stays NaN. d k is never rounded as a
// whole, and the shift's extra 127 makes the integer a power of two's bits, those of n = -127 being
// 0.
inline float exp2_scaled(float d, float k) {
  constexpr float kShift = kRoundingShift + 127.0f;
  const float lowest = -127.0f / k;
  const float bounded = d < lowest ? lowest : d;
  const float rounded = bounded * k + kShift;
  const float f = bounded * k - (rounded - kShift);
  float p = 1.3264727253e-3f;
  p = p * f + 9.6715127858e-3f;
  p = p * f + 5.5507337445e-2f;
  p = p * f + 2.4022242083e-1f;
  p = p * f + 6.9314697760e-1f;
  p = p * f + 1.0f;
  return p * std::bit_cast<float>(std::bit_cast<uint32_t>(rounded) << 23);
}

// e^x - 1 for x <= 0, small x included.
inline float expm1_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const ReducedExp reduced = reduce_exp(clamped);
  const float r = reduced.r;
  const float scale = std::bit_cast<float>(reduced.shifted + 0x3F800000);
  return (exp_tail(r) * r * r + r) * scale + (scale - 1.0f);
}

// ln(1 + y) for -1 < y <= 0: ln 2 times the exponent, plus a polynomial of the mantissa in
// [sqrt(1/2), sqrt(2)).
inline float log1p_nonpositive(float y) {
  const float u = 1.0f + y;
  const int32_t bits = std::bit_cast<int32_t>(u);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float mantissa = std::bit_cast<float>(bits - exponent * 0x800000);
  // near 1 the rounding of 1 + y would be all that is left: there the polynomial takes y itself
  const float f = exponent == 0 ? y : mantissa - 1.0f;
  const float lost = exponent == 0 ? 0.0f : (y - (u - 1.0f)) / u;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float n = static_cast<float>(exponent);
  const float low = p * f * f * f + n * -2.12194440e-4f - 0.5f * f * f + lost;
  return n * 0.693359375f + (f + low);
}

inline double exp_fast(double x) {
  return std::exp(x);
}
inline double exp2_scaled(double d, double k) {
  return std::exp2(d * k);
}
inline double exp_nonpositive(double x) {
  return std::exp(x);
}
inline double expm1_nonpositive(double x) {
  return std::expm1(x);
}
inline double log1p_nonpositive(double y) {
  return std::log1p(y);
}

}  // namespace deepfusion::inline DF_LEVEL
