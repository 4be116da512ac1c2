// Shares out rows that are sorted by expert: equal numbers of rows a thread, cut where an expert
// ends.
#pragma once

#include "common/cpu.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

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

// body(each) once a share, where each(work) calls work(task) for the tasks of this share, then for
// those that others have not come to: a share finds in its cache what it wrote the time before, and
// no thread waits for one that was held up.
template <typename Body>
inline void for_stolen(int64_t tasks, const Body& body) {
  const int64_t shares = std::min(num_shares(), tasks);
  std::vector<std::atomic<int64_t>> next(shares);
  for (int64_t share = 0; share < shares; ++share) next[share] = tasks * share / shares;
  for_shares(shares, [&](int64_t share) {
    body([&](const auto& work) {
      for (int64_t n = 0; n < shares; ++n) {
        const int64_t other = (share + n) % shares, end = tasks * (other + 1) / shares;
        for (int64_t task = next[other]++; task < end; task = next[other]++) work(task);
      }
    });
  });
}

// body(RowBlock) for the rows of one share, in blocks of `limit` rows; the last of an expert takes
// up to half as many more, since a short block costs as much packing as a long one.
template <typename Body>
inline void for_blocks(const int32_t* offsets, int64_t num_experts, int64_t share, int64_t shares,
                       int64_t limit, const Body& body) {
  const int64_t rows = offsets[num_experts];
  const int64_t last = rows * (share + 1) / shares;
  int64_t row = rows * share / shares;
  int64_t expert = std::upper_bound(offsets, offsets + num_experts + 1, row) - offsets - 1;
  while (row < last) {
    while (offsets[expert + 1] <= row) ++expert;
    const int64_t stop = std::min<int64_t>(last, offsets[expert + 1]);
    const int64_t end = stop - row <= limit + limit / 2 ? stop : row + limit;
    body(RowBlock{expert, row, end});
    row = end;
  }
}

// Which experts the ends of the shares cut in two.
struct Cuts {
  // the first row of a cut expert among all rows of cut experts; -1: the expert lies in one share
  std::vector<int64_t> place;
  int64_t rows = 0;
  int64_t busiest = 0;
  int64_t busiest_whole = 0;

  Cuts(const int32_t* offsets, int64_t num_experts, int64_t shares) : place(num_experts, -1) {
    const int64_t all = offsets[num_experts];
    int64_t share = 0;
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      const int64_t count = offsets[expert + 1] - offsets[expert];
      while (share < shares && all * share / shares <= offsets[expert]) ++share;
      busiest = std::max(busiest, count);
      if (share < shares && all * share / shares < offsets[expert + 1]) {
        place[expert] = rows;
        rows += count;
      } else {
        busiest_whole = std::max(busiest_whole, count);
      }
    }
  }
};

// body(expert, share, part) for every cut expert and share; part(strips) is the share's part
// [first, last) of the expert's strips, in proportion to its rows.
template <typename Body>
inline void for_parts(const int32_t* offsets, const std::vector<int64_t>& place, int64_t shares,
                      const Body& body) {
  const int64_t num_experts = static_cast<int64_t>(place.size()), rows = offsets[num_experts];
  for_shares(shares, [&](int64_t share) {
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      if (place[expert] < 0) continue;
      const int64_t start = offsets[expert], count = offsets[expert + 1] - start;
      body(expert, share, [&](int64_t strips) {
        const auto strip_at = [&](int64_t row) {
          return std::clamp<int64_t>(((row - start) * strips + count - 1) / count, 0, strips);
        };
        return std::pair(strip_at(rows * share / shares), strip_at(rows * (share + 1) / shares));
      });
    }
  });
}

}  // namespace deepfusion::inline DF_LEVEL
