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

template <Activation ACT, typename W>
inline Activated<W> activate(W g) {
  constexpr W one = 1;
  if constexpr (ACT == Activation::kSilu) {
    const W s = one / (one + exp_fast(-g));
    return {g * s, s * (one + g * (one - s))};
  } else if constexpr (ACT == Activation::kGelu) {
    const W phi = exp_fast(W(-0.5) * g * g) * W(0.39894228040143267794);
    const W below = W(0.5) * (one + std::erf(g * W(0.70710678118654752440)));
    return {g * below, below + g * phi};
  } else {
    constexpr W c = 0.79788456080286535588;
    constexpr W cubic = 0.044715;
    const W s = one / (one + exp_fast(W(-2) * c * (g + cubic * g * g * g)));
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
