// Products of rows that lie anywhere with a factor that is packed on the way: blocks of rows and
// panels that stay in the second-level cache, sums cut at kSumSteps.
//
//   out[j][r] = sum_k row_j(r)[k] B_j[k]        B = W^T (by_rows), W (by_columns)
//
// An element's sum does not depend on how the work is shared out.
#pragma once

#include "common/panels.h"

namespace deepfusion::inline DF_LEVEL {

// Whether rows of this dtype are multiplied here; elsewhere the library's products serve.
template <typename T>
inline bool multiplies_rows() {
#if defined(DF_LEVEL_avx512)
  return std::is_same_v<T, float> || (std::is_same_v<T, BFloat16> && multiplies_bfloat16());
#else
  return false;
#endif
}

// With 64 steps of depth 128, a quarter of a second-level cache for the sums of such a block.
constexpr int64_t kBlockRows = 512;
constexpr int64_t kMostPanels = 4;
// A quarter of a second-level cache for a thread's panels.
constexpr int64_t kPanelBytes = int64_t{256} << 10;
// Results from this size on, twice a second-level cache, are written past it.
constexpr int64_t kStreamedBytes = int64_t{2} << 20;

// One thread's panels and sums. Where panels are packed beside tiles there are two sets: one is
// multiplied, the other filled.
template <typename S>
struct BlockMemory {
  using Wide = typename Operand<S>::Wide;
  static constexpr int64_t kTile = kTileRows * kColumns<S>;
  int64_t pitch;
  Aligned<Wide> memory;
  Aligned<Wide> sums;
  Side<S> now, later;

  BlockMemory(const Products& of, int64_t panels, int64_t sides)
      : pitch(std::min(kSumSteps, steps_of<S>(of.depth) + kLanes<S>) * kColumns<S>),
        memory(pitch * panels * sides),
        sums(steps_of<S>(of.depth) > kSumSteps
                 ? (std::min(kBlockRows, of.rows) + kTileRows) * kColumns<S> * panels
                 : kTile),
        now{reinterpret_cast<unit_t<S>*>(memory.get()), pitch},
        later{now.panels + (sides - 1) * panels * pitch, pitch} {}
};

// finish(row, column, sums) takes kColumns finished sums; rows are walked `step` units a term.
// `next` is the task that this thread expects to do then.
template <typename S, typename RowAt, typename Pack, typename Finish>
void run_task(const Products& of, const Task& task, const Task& next, const RowAt& row_at,
              int64_t step, const Pack& pack, BlockMemory<S>& memory, const Finish& finish) {
  constexpr int64_t WIDTH = kColumns<S>, kTerms = kSumSteps * Operand<S>::kDepth;
  const int64_t steps = steps_of<S>(of.depth), panels = (task.columns + WIDTH - 1) / WIDTH;
  const int64_t parts = (task.rows + kTileRows - 1) / kTileRows * panels;
  const auto piece_of = [&](const Task& some, int64_t term) {
    return Piece{some.matrix, some.column, some.columns, term, std::min(kTerms, of.depth - term)};
  };
  for (int64_t k = 0; k < steps; k += kSumSteps) {
    const int64_t some = std::min(kSumSteps, steps - k);
    const bool is_last = k + some == steps;
    const Piece piece = piece_of(task, k * Operand<S>::kDepth);
    const Piece then = is_last ? piece_of(next, 0) : piece_of(task, piece.term + piece.terms);
    if (memory.later.holds == piece)
      std::swap(memory.now, memory.later);
    else
      pack(piece, memory.now);
    const auto ahead = pack.ahead(then, memory.later);
    for (int64_t i = 0; i < task.rows; i += kTileRows) {
      const int count = static_cast<int>(std::min<int64_t>(kTileRows, task.rows - i));
      const unit_t<S>* rows[kTileRows];
      for (int r = 0; r < count; ++r) rows[r] = row_at(task.matrix, task.row + i + r) + k * step;
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t part = i / kTileRows * panels + p;
        auto* sums = memory.sums.get() + (steps > kSumSteps ? part * memory.kTile : 0);
        auto chore = ahead.part(part, parts);
        multiply_rows<S>(count, rows, step, memory.now.panels + p * memory.pitch, some, k == 0,
                         sums, chore);
        while (chore.left > 0) chore.one();
        for (int r = 0; r < count && is_last; ++r)
          finish(task.row + i + r, task.column + p * WIDTH, sums + r * WIDTH);
      }
    }
  }
}

// Every task of the products, taken by whichever thread is free: body(task, the one after it,
// memory).
template <typename S, typename Body>
void for_tasks(const Products& of, int64_t sides, const Body& body) {
  constexpr int64_t kFewTasks = 16;
  const int64_t blocks = (of.rows + kBlockRows - 1) / kBlockRows;
  int64_t width = kMostPanels * kColumns<S>;
  const auto groups = [&] { return (of.columns + width - 1) / width; };
  const auto is_much = [&] {
    return sides * width * std::min(kSumSteps, steps_of<S>(of.depth)) * int64_t{sizeof(unit_t<S>)} >
           kPanelBytes;
  };
  while (width > kColumns<S> && (of.count * blocks * groups() < kFewTasks || is_much())) width /= 2;
  const int64_t each = groups(), tasks = of.count * blocks * each;
  for_stolen(tasks, [&](const auto& each_task) {
    BlockMemory<S> memory(of, width / kColumns<S>, sides);
    const auto task_at = [&](int64_t task) {
      const int64_t column = task % each * width, row = task / each % blocks * kBlockRows;
      return Task{task / each / blocks, row, std::min(kBlockRows, of.rows - row), column,
                  std::min(width, of.columns - column)};
    };
    each_task(
        [&](int64_t task) { body(task_at(task), task_at(std::min(task + 1, tasks - 1)), memory); });
    finish_streams();
  });
}

// finish(matrix, row, column, count, sums) takes `count` of kColumns sums.
template <typename S, typename RowAt, typename Pack, typename Finish>
void multiply(const Products& of, const RowAt& row_at, int64_t step, const Pack& pack,
              const Finish& finish) {
  for_tasks<S>(of, Pack::kSides, [&](const Task& task, const Task& next, BlockMemory<S>& memory) {
    run_task<S>(of, task, next, row_at, step, pack, memory,
                [&](int64_t row, int64_t column, const auto* sums) {
                  finish(task.matrix, row, column, std::min(kColumns<S>, of.columns - column),
                         sums);
                });
  });
}

// `count` of kColumns sums rounded to T, past the cache where that was found to be possible.
template <typename S, typename T, typename W>
inline void put_lanes(const W* sums, int64_t count, bool streams, T* to) {
  if (streams && count == kColumns<S>) {
    stream_lanes<S, kColumns<S>>(sums, to);
  } else {
    round_lanes<S, kColumns<S>>(sums, count, to);
  }
}

}  // namespace deepfusion::inline DF_LEVEL
