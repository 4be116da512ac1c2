// Products of rows that lie anywhere with a factor that is packed on the way: blocks of rows and
// panels that stay in the second-level cache, sums cut at kSumSteps.
//
//   out[j][r] = sum_k row_j(r)[k] B_j[k]        B = W^T (by_rows), W (by_columns)
//
// An element's sum does not depend on how the work is shared out.
#pragma once

#include "common/held_bytes.h"
#include "common/pack.h"
#include "common/row_blocks.h"

#include <cstdlib>
#include <memory>

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
// Results from this size on, twice a second-level cache, are written past it.
constexpr int64_t kStreamedBytes = int64_t{2} << 20;

struct Free {
  int64_t bytes;
  void operator()(void* memory) const {
    std::free(memory);
    HeldBytes::add(-bytes);
  }
};

// `count` elements on a cache line's boundary, as panels want it.
template <typename T>
class Aligned {
 public:
  explicit Aligned(int64_t count) : Aligned(count, (count * int64_t{sizeof(T)} + 127) / 64 * 64) {}
  T* get() const { return static_cast<T*>(memory_.get()); }

 private:
  Aligned(int64_t, int64_t bytes) : memory_(std::aligned_alloc(64, bytes), Free{bytes}) {
    HeldBytes::add(bytes);
  }
  std::unique_ptr<void, Free> memory_;
};

template <typename S>
const unit_t<S>* as_units(const S* elements) {
  return reinterpret_cast<const unit_t<S>*>(elements);
}

// `count` matrices of `rows` rows; `columns` of the other factor, `depth` terms a sum.
struct Products {
  int64_t count, rows, columns, depth;
};

// One task: some rows of one matrix against some neighbouring panels.
struct Task {
  int64_t matrix, row, rows, column, columns;
};

// What panels will be packed from, fetched while others are multiplied: pairs of lines, row by row.
struct Fetch {
  const char* row = nullptr;
  int64_t bytes = 0, stride = 0, column = 0, left = 0;

  // part of `parts` of `rows` rows, whose first `bytes` bytes are wanted
  Fetch part(int64_t rows, int64_t part, int64_t parts) const {
    const int64_t pairs = (bytes + 127) / 128, first = rows * pairs * part / parts;
    return {row + first / pairs * stride, bytes, stride, first % pairs * 128,
            rows * pairs * (part + 1) / parts - first};
  }
  void one() {
    __builtin_prefetch(row + column, 0, 2);
    __builtin_prefetch(row + column + 64, 0, 2);
    column += 128;
    if (column >= bytes) {
      column = 0;
      row += stride;
    }
    --left;
  }
};

// Packs terms [k, k + depth) of columns [column, column + count) of matrix j.
template <typename S>
struct ByRows {
  const S* weight;  // [count, columns, depth]
  const Products* of;
  void operator()(int64_t j, int64_t column, int64_t count, int64_t k, int64_t depth,
                  unit_t<S>* panel) const {
    const S* sources[kColumns<S>];
    for (int64_t c = 0; c < kColumns<S>; ++c)
      sources[c] = c < count ? weight + (j * of->columns + column + c) * of->depth + k : nullptr;
    pack_rows<S>(sources, depth, panel);
  }
  int64_t source_rows(int64_t columns, int64_t) const { return columns; }
  Fetch source(int64_t j, int64_t column, int64_t, int64_t k, int64_t depth) const {
    const S* first = weight + (j * of->columns + column) * of->depth + k;
    return {reinterpret_cast<const char*>(first), depth * int64_t{sizeof(S)},
            of->depth * int64_t{sizeof(S)}};
  }
};
// The same where row_at(j, k) points at term k of column 0.
template <typename S, typename RowAt>
struct ByColumns {
  RowAt row_at;
  void operator()(int64_t j, int64_t column, int64_t count, int64_t k, int64_t depth,
                  unit_t<S>* panel) const {
    pack_columns<S, kColumns<S>>([&](int64_t term) { return row_at(j, k + term) + column; }, depth,
                                 count, panel);
  }
  int64_t source_rows(int64_t, int64_t depth) const { return depth; }
  Fetch source(int64_t j, int64_t column, int64_t columns, int64_t k, int64_t depth) const {
    const char* first = reinterpret_cast<const char*>(row_at(j, k) + column);
    const char* last = reinterpret_cast<const char*>(row_at(j, k + depth - 1) + column);
    // rows need not be equally far apart: what is missed is fetched when it is packed
    return {first, columns * int64_t{sizeof(S)}, (last - first) / std::max<int64_t>(depth - 1, 1)};
  }
};
template <typename S, typename RowAt>
ByColumns<S, RowAt> by_columns(const RowAt& row_at) {
  return {row_at};
}

// One thread's panels and sums.
template <typename S>
struct BlockMemory {
  using Wide = typename Operand<S>::Wide;
  static constexpr int64_t kTile = kTileRows * kColumns<S>;
  int64_t pitch;
  Aligned<Wide> memory;
  Aligned<Wide> sums;

  explicit BlockMemory(const Products& of)
      : pitch(std::min(kSumSteps, steps_of<S>(of.depth) + kLanes<S>) * kColumns<S>),
        memory(pitch * kMostPanels),
        sums(steps_of<S>(of.depth) > kSumSteps
                 ? (std::min(kBlockRows, of.rows) + kTileRows) * kColumns<S> * kMostPanels
                 : kTile) {}
  unit_t<S>* panel(int64_t p) const {
    return reinterpret_cast<unit_t<S>*>(memory.get()) + p * pitch;
  }
};

// finish(row, column, sums) takes kColumns finished sums; rows are walked `step` units a term.
// `next` is the task that this thread expects to do then.
template <typename S, typename RowAt, typename Pack, typename Finish>
void run_task(const Products& of, const Task& task, const Task& next, const RowAt& row_at,
              int64_t step, const Pack& pack, const BlockMemory<S>& memory, const Finish& finish) {
  constexpr int64_t WIDTH = kColumns<S>;
  const int64_t steps = steps_of<S>(of.depth), panels = (task.columns + WIDTH - 1) / WIDTH;
  for (int64_t k = 0; k < steps; k += kSumSteps) {
    const int64_t piece = std::min(kSumSteps, steps - k), term = k * Operand<S>::kDepth;
    const int64_t terms = std::min(of.depth - term, piece * Operand<S>::kDepth);
    for (int64_t p = 0; p < panels; ++p)
      pack(task.matrix, task.column + p * WIDTH, std::min(WIDTH, task.columns - p * WIDTH), term,
           terms, memory.panel(p));
    const bool is_last = k + piece == steps;
    const Task& then = is_last ? next : task;
    const int64_t then_term = is_last ? 0 : term + terms;
    const int64_t then_terms = std::min(of.depth - then_term, kSumSteps * Operand<S>::kDepth);
    const Fetch source = pack.source(then.matrix, then.column, then.columns, then_term, then_terms);
    const int64_t source_rows = pack.source_rows(then.columns, then_terms);
    const int64_t parts = (task.rows + kTileRows - 1) / kTileRows * panels;
    for (int64_t i = 0; i < task.rows; i += kTileRows) {
      const int count = static_cast<int>(std::min<int64_t>(kTileRows, task.rows - i));
      const unit_t<S>* rows[kTileRows];
      for (int r = 0; r < count; ++r) rows[r] = row_at(task.matrix, task.row + i + r) + k * step;
      for (int64_t p = 0; p < panels; ++p) {
        auto* sums = memory.sums.get();
        if (steps > kSumSteps) sums += (i / kTileRows * panels + p) * memory.kTile;
        Fetch fetch = source.part(source_rows, i / kTileRows * panels + p, parts);
        multiply_rows<S>(count, rows, step, memory.panel(p), piece, k == 0, sums, fetch);
        for (int r = 0; r < count && is_last; ++r)
          finish(task.row + i + r, task.column + p * WIDTH, sums + r * WIDTH);
      }
    }
  }
}

// Every task of the products, taken by whichever thread is free: body(task, the one after it,
// memory).
template <typename S, typename Body>
void for_tasks(const Products& of, const Body& body) {
  constexpr int64_t kFewTasks = 16;
  const int64_t blocks = (of.rows + kBlockRows - 1) / kBlockRows;
  int64_t width = kMostPanels * kColumns<S>;
  const auto groups = [&] { return (of.columns + width - 1) / width; };
  while (width > kColumns<S> && of.count * blocks * groups() < kFewTasks) width /= 2;
  const int64_t each = groups(), tasks = of.count * blocks * each;
  for_stolen(tasks, [&](const auto& each_task) {
    const BlockMemory<S> memory(of);
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
  for_tasks<S>(of, [&](const Task& task, const Task& next, const BlockMemory<S>& memory) {
    run_task<S>(of, task, next, row_at, step, pack, memory,
                [&](int64_t row, int64_t column, const auto* sums) {
                  finish(task.matrix, row, column, std::min(kColumns<S>, of.columns - column),
                         sums);
                });
  });
}

// The transpose of a left factor [terms, rows], packed in strips: row i at `at(i)`, kStrip units a
// term.
template <typename S>
class Turned {
 public:
  static constexpr int64_t kStrip = 32;

  // source_at(j, k) points at row 0 of term k
  template <typename SourceAt>
  Turned(const Products& of, const SourceAt& source_at)
      : pitch_(steps_of<S>(of.depth) * kStrip),
        strips_((of.rows + kStrip - 1) / kStrip),
        memory_(of.count * strips_ * pitch_) {
    for_rows(of.count * strips_, 1, [&](int64_t strip) {
      const int64_t j = strip / strips_, first = strip % strips_ * kStrip;
      pack_columns<S, kStrip>([&](int64_t k) { return source_at(j, k) + first; }, of.depth,
                              std::min(kStrip, of.rows - first), units() + strip * pitch_);
    });
  }
  const unit_t<S>* at(int64_t j, int64_t i) const {
    return units() + (j * strips_ + i / kStrip) * pitch_ + i % kStrip;
  }

 private:
  unit_t<S>* units() const { return reinterpret_cast<unit_t<S>*>(memory_.get()); }

  int64_t pitch_, strips_;
  Aligned<typename Operand<S>::Wide> memory_;
};

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
