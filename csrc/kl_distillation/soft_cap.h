// Soft cap of raw logits, before anything else reads them: s' = b tanh(s / b), ds'/ds = 1 -
// (s'/b)^2. Missing logits stay missing, and get no gradient through it.
#pragma once

#include "common/kl_math.h"

namespace deepfusion {
inline namespace DF_LEVEL {

// cap = 0: none.
template <typename W>
DF_FN W soft_capped(W x, W cap) {
  if (cap == W(0) || x <= W(kMissing)) return x;
  const W z = x / cap;
  const W e = expm1_nonpositive(W(-2) * (z < W(0) ? -z : z));
  const W tanh_z = e / (W(2) + e);
  return z < W(0) ? cap * tanh_z : -cap * tanh_z;
}

template <typename W>
DF_FN W soft_cap_slope(W capped, W cap) {
  if (capped <= W(kMissing)) return W(0);
  const W share = capped / cap;
  return W(1) - share * share;
}

}  // namespace DF_LEVEL
}  // namespace deepfusion
