// Which row of a sorted buffer each (token, choice) slot takes: a stable counting sort by expert.
//
//   order[r] = slot of row r, or -1 past offsets[E]
//   slots[s] = row of slot s, or -1 for a sentinel: an id < 0 or >= E, which owns no row
//   rows of expert e = offsets[e] .. offsets[e + 1], in slot order
//
// Plain C++, so that ctest covers it without torch.
#pragma once

#include "common/cpu_level.h"

#include <cstdint>
#include <vector>

namespace deepfusion::inline DF_LEVEL {

template <typename Id>
inline bool is_expert(Id id, int64_t num_experts) {
  return id >= 0 && static_cast<int64_t>(id) < num_experts;
}

// experts [R] -> order [R], slots [R], offsets [E + 1]; R < 2^31 is the caller's to check.
template <typename Id>
inline void moe_plan(const Id* experts, int64_t num_rows, int64_t num_experts, int32_t* order,
                     int32_t* slots, int32_t* offsets) {
  std::vector<int32_t> cursor(num_experts, 0);
  for (int64_t slot = 0; slot < num_rows; ++slot) {
    if (is_expert(experts[slot], num_experts)) ++cursor[experts[slot]];
  }
  int32_t begin = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int32_t count = cursor[expert];
    offsets[expert] = cursor[expert] = begin;
    begin += count;
  }
  offsets[num_experts] = begin;
  for (int64_t slot = 0; slot < num_rows; ++slot) {
    if (!is_expert(experts[slot], num_experts)) {
      slots[slot] = -1;
      continue;
    }
    const int32_t row = cursor[experts[slot]]++;
    order[row] = static_cast<int32_t>(slot);
    slots[slot] = row;
  }
  for (int64_t row = begin; row < num_rows; ++row) order[row] = -1;
}

}  // namespace deepfusion::inline DF_LEVEL
