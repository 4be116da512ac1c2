// act(g) and act'(g) of the gate half of an expert.
//
//   silu       g s                    s = 1 / (1 + e^-g)          slope  s (1 + g (1 - s))
//   gelu       g Phi(g)                                           slope  Phi(g) + g phi(g)
//   gelu_tanh  g s,  s = 1 / (1 + e^-2z), z = c (g + 0.044715 g^3)  slope  s + 2 g s (1 - s) z' (1
//   + tanh z = 2 s)
#pragma once

#include "common/cpu.h"

namespace deepfusion::inline DF_LEVEL {

enum class Activation : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

template <typename W>
struct Activated {
  W value;
  W slope;
};

// 1 / (1 + e^-x); any number where x is NaN, which a product with x hides.
inline double logistic(double x) {
  return 1 / (1 + std::exp(-x));
}
inline float logistic(float x) {
  // beyond these it is 0 or 1 to float32 anyway, and e^-x stays finite
  const float above = x > -87.0f ? x : -87.0f;
  const ReducedExp reduced = reduce_exp(above < 87.0f ? -above : -87.0f);
  const float r = reduced.r;
  const float y = exp_tail(r) * r * r + r + 1.0f;
  return 1.0f / (1.0f + scale_by_power(y, reduced.shifted));
}

template <Activation ACT, typename W>
inline Activated<W> activate(W g) {
  constexpr W one = 1;
  if constexpr (ACT == Activation::kSilu) {
    const W s = logistic(g);
    return {g * s, s * (one + g * (one - s))};
  } else if constexpr (ACT == Activation::kGelu) {
    const W phi = exp_fast(W(-0.5) * g * g) * W(0.39894228040143267794);
    const W below = W(0.5) * (one + std::erf(g * W(0.70710678118654752440)));
    return {g * below, below + g * phi};
  } else {
    constexpr W c = 0.79788456080286535588;
    constexpr W cubic = 0.044715;
    const W s = logistic(W(2) * c * (g + cubic * g * g * g));
    return {g * s, s + W(2) * g * s * (one - s) * c * (one + W(3) * cubic * g * g)};
  }
}

// body(std::integral_constant<Activation, ...>) for the activation asked for.
template <typename Body>
inline void with_activation(Activation activation, const Body& body) {
  if (activation == Activation::kSilu)
    return body(std::integral_constant<Activation, Activation::kSilu>());
  if (activation == Activation::kGelu)
    return body(std::integral_constant<Activation, Activation::kGelu>());
  body(std::integral_constant<Activation, Activation::kGeluTanh>());
}

}  // namespace deepfusion::inline DF_LEVEL
