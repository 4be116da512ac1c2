// Shares out rows that are sorted by expert: equal numbers of rows a thread, cut where an expert
// ends.
#pragma once

#include "common/cpu.h"

#include <algorithm>

namespace deepfusion::inline DF_LEVEL {

// A stretch of rows of one expert.
struct RowBlock {
  int64_t expert;
  int64_t begin;
  int64_t end;
};

// body(share) for every share of the pool's threads; the number of a share also names its scratch
// memory.
template <typename Body>
inline void for_shares(int64_t shares, const Body& body) {
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) body(share);
  });
}

inline int64_t num_shares() {
  return std::max<int64_t>(1, torch::stable::get_num_threads());
}

// body(RowBlock) for the rows of one share, in blocks of at most `limit` rows.
template <typename Body>
inline void for_blocks(const int32_t* offsets, int64_t num_experts, int64_t share, int64_t shares,
                       int64_t limit, const Body& body) {
  const int64_t rows = offsets[num_experts];
  const int64_t last = rows * (share + 1) / shares;
  int64_t row = rows * share / shares;
  int64_t expert = std::upper_bound(offsets, offsets + num_experts + 1, row) - offsets - 1;
  while (row < last) {
    while (offsets[expert + 1] <= row) ++expert;
    const int64_t end = std::min({last, row + limit, static_cast<int64_t>(offsets[expert + 1])});
    body(RowBlock{expert, row, end});
    row = end;
  }
}

// body(expert, first panel, last panel): each expert's panels belong to the shares in proportion to
// its rows.
template <typename Body>
inline void for_panels(const int32_t* offsets, int64_t num_experts, int64_t share, int64_t shares,
                       int64_t panels, const Body& body) {
  const int64_t rows = offsets[num_experts];
  const int64_t begin = rows * share / shares;
  const int64_t end = rows * (share + 1) / shares;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int64_t start = offsets[expert], count = offsets[expert + 1] - start;
    if (count == 0 || start >= end || start + count <= begin) continue;
    const auto panel_at = [&](int64_t row) {
      return std::clamp<int64_t>(((row - start) * panels + count - 1) / count, 0, panels);
    };
    if (panel_at(begin) < panel_at(end)) body(expert, panel_at(begin), panel_at(end));
  }
}

}  // namespace deepfusion::inline DF_LEVEL
