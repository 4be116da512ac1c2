// What a router does, as plain numbers; the CPU and CUDA twins read the same. No torch header.
#pragma once

#ifdef __CUDACC__
#define DF_LEVEL device
#else
#include "common/cpu_level.h"
#endif

#include <cstdint>

namespace deepfusion {
inline namespace DF_LEVEL {

struct Options {
  int64_t top_k, num_groups, top_groups;
  bool is_sigmoid, is_topk_first, renormalize, is_top2_sum;
  double scale, balance, z;

  // renormalised softmax scores are the softmax of the selected logits
  constexpr bool is_selected_softmax() const {
    return !is_sigmoid && (renormalize || is_topk_first);
  }
  // scores grow with logits: comparing logits gives the same choice, free of rounding
  constexpr bool chooses_by_logit(bool has_bias) const {
    return is_topk_first || (!has_bias && !is_top2_sum);
  }
  constexpr bool needs_lse() const {
    return (balance != 0 && !is_sigmoid) || z != 0 || !(is_sigmoid || is_selected_softmax());
  }
  constexpr bool needs_mass() const { return balance != 0 && is_sigmoid; }
  constexpr bool needs_scores(bool has_bias) const {
    return balance != 0 || !chooses_by_logit(has_bias) || !(is_sigmoid || is_selected_softmax());
  }
};

constexpr double kTiny = 1e-20;  // beside the sum of renormalised sigmoid scores

}  // namespace DF_LEVEL
}  // namespace deepfusion
