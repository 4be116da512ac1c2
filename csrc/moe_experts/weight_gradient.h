// Gradients of the projections: out[e] = left^T right over the rows of expert e, rows ascending.
#pragma once

#include "moe_experts/experts.h"

namespace deepfusion::inline DF_LEVEL {

// Units of the packed right factor: 512 KiB of float32, half of a second-level cache.
constexpr int64_t kRightUnits = 128 * 1024;

// Gradients from this size on are written past the cache.
constexpr int64_t kStreamedBytes = int64_t{4} << 20;

// Rows of a gradient whose left factor is packed together: whole cache lines of its rows are read.
constexpr int64_t kStripRows = 32;

// One projection's gradient [E, m, n], with left_at(r)[m] and right_at(r)[n].
template <typename T, typename Left, typename Right>
struct WeightGradient {
  T* out;
  int64_t m;
  Left left_at;
  int64_t n;
  Right right_at;
  int64_t num_strips() const { return (m + kStripRows - 1) / kStripRows; }
};

// A share's packed factors: one strip of the left one, many panels of the right one.
template <typename S>
struct Factors {
  unit_t<S>* left;
  unit_t<S>* right;
  int64_t right_units;
};

template <typename S>
struct FactorMemory {
  using Wide = typename Operand<S>::Wide;
  Scratch<Wide> left, right;
  int64_t right_units;
  // four panels at least, so that packing the left strip for each of them stays cheap
  FactorMemory(const Tensor& like, int64_t shares, int64_t busiest)
      : left(like, shares, steps_of<S>(busiest) * kStripRows),
        right(like, shares, std::max(kRightUnits, steps_of<S>(busiest) * kColumns<S> * 4)),
        right_units(right.pitch) {}
  Factors<S> of(int64_t share) {
    return {reinterpret_cast<unit_t<S>*>(left.of(share)),
            reinterpret_cast<unit_t<S>*>(right.of(share)), right_units};
  }
};

// Columns [j0, j0 + columns) of the right factor, a few rows at a time: these are read as they lie
// in memory.
template <typename S, typename Gradient>
void pack_right(const Gradient& g, int64_t start, int64_t depth, int64_t j0, int64_t columns,
                unit_t<S>* right) {
  constexpr int64_t kRows = 16;
  for (int64_t k0 = 0; k0 < depth; k0 += kRows) {
    unit_t<S>* target = right + k0 / Operand<S>::kDepth * kColumns<S>;
    for (int64_t j = 0; j < columns; j += kColumns<S>) {
      pack_columns<S, kColumns<S>>([&](int64_t k) { return g.right_at(start + k0 + k) + j0 + j; },
                                   std::min(kRows, depth - k0), std::min(kColumns<S>, columns - j),
                                   target + j * steps_of<S>(depth));
    }
  }
}

// Strips [first, last) of an expert. Whole rows of the result are written one after the other, so
// that a fresh page is still in the cache when it is filled.
template <typename T, typename S, typename Gradient>
void weight_strips(const Experts<T, S>& e, const Gradient& g, int64_t expert, int64_t first,
                   int64_t last, const Factors<S>& memory) {
  const int64_t start = e.offsets[expert], depth = e.offsets[expert + 1] - start;
  const int64_t steps = steps_of<S>(depth);
  const int64_t width = memory.right_units / (steps * kColumns<S>)*kColumns<S>;
  const auto row_at = [&](int64_t i) { return memory.left + i; };
  // smaller ones are read from the cache by whoever comes next
  const bool streams =
      e.size.E * g.m * g.n * int64_t{sizeof(T)} >= kStreamedBytes && can_stream(g.out, g.n);
  if (first == last) return;
  for (int64_t j0 = 0; j0 < g.n; j0 += width) {
    const int64_t columns = std::min(width, g.n - j0);
    pack_right<S>(g, start, depth, j0, columns, memory.right);
    for (int64_t i = first * kStripRows; i < std::min(g.m, last * kStripRows); i += kStripRows) {
      const int64_t rows = std::min(kStripRows, g.m - i);
      pack_columns<S, kStripRows>([&](int64_t k) { return g.left_at(start + k) + i; }, depth, rows,
                                  memory.left);
      T* target = g.out + (expert * g.m + i) * g.n + j0;
      for (int64_t j = 0; j < columns; j += kColumns<S>) {
        const int64_t count = std::min(kColumns<S>, columns - j);
        sweep<S>(row_at, rows, kStripRows, memory.right + j * steps, steps,
                 [&](int64_t r, const auto* sums) {
                   T* row = target + r * g.n + j;
                   if (streams && count == kColumns<S>) {
                     stream_lanes<S, kColumns<S>>(sums, row);
                   } else {
                     round_lanes<S, kColumns<S>>(sums, count, row);
                   }
                 });
      }
    }
  }
  if (streams) finish_streams();
}

}  // namespace deepfusion::inline DF_LEVEL
