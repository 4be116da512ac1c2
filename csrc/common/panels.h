// The factor of a product that is packed on the way (common/row_products.h): whence its panels
// come, and what is done for the next ones while tiles of these are multiplied.
#pragma once

#include "common/held_bytes.h"
#include "common/lanes.h"
#include "common/pack.h"
#include "common/row_blocks.h"

#include <cstdlib>
#include <memory>
#include <vector>

namespace deepfusion::inline DF_LEVEL {

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

// Terms [term, term + terms) of the columns of a task: what its panels hold at a time.
struct Piece {
  int64_t matrix = -1, column = 0, columns = 0, term = 0, terms = 0;
  bool operator==(const Piece&) const = default;
};

// One set of a thread's panels, `pitch` units apart, and what was packed there ahead.
template <typename S>
struct Side {
  unit_t<S>* panels;
  int64_t pitch;
  Piece holds{};
  std::vector<const S*> terms{};
};

// What panels will be packed from, fetched while others are multiplied: pairs of lines, row by row.
struct Fetch {
  const char* row = nullptr;
  int64_t rows = 0, bytes = 0, stride = 0, column = 0, left = 0;

  // one of `parts` parts of the first `bytes` bytes of every row
  Fetch part(int64_t part, int64_t parts) const {
    const int64_t pairs = (bytes + 127) / 128, first = rows * pairs * part / parts;
    return {row + first / pairs * stride,
            rows,
            bytes,
            stride,
            first % pairs * 128,
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

// Panels of pairs packed while others are multiplied, a step in every kEvery pieces: its sources
// come from memory kAhead steps early, and many at a time would hold up the products.
template <typename S>
struct Fill {
  static constexpr int64_t kDepth = Operand<S>::kDepth, kEvery = 4, kAhead = 16;

  const S* const* terms = nullptr;  // row of every term
  int64_t steps = 0, step = 0, column = 0, columns = 0, pitch = 0, left = 0;
  unit_t<S>* panels = nullptr;

  Fill part(int64_t part, int64_t parts) const {
    const int64_t all = columns / kColumns<S> * steps, first = all * part / parts;
    Fill some = *this;
    if (first == all) return some;
    some.step = first % steps;
    some.column += first / steps * kColumns<S>;
    some.panels += first / steps * pitch;
    some.left = (all * (part + 1) / parts - first) * kEvery;
    return some;
  }
  void one() {
    if (--left % kEvery) return;
    pack_columns<S, kColumns<S>>([this](int64_t k) { return terms[step * kDepth + k] + column; },
                                 kDepth, kColumns<S>, panels + step * kColumns<S>);
    int64_t later = step + kAhead, at = column;
    if (later >= steps) {
      later -= steps;
      at += kColumns<S>;
    }
    if (later < steps) {
      __builtin_prefetch(terms[later * kDepth] + at, 0, 2);
      __builtin_prefetch(terms[later * kDepth + 1] + at, 0, 2);
    }
    if (++step == steps) {
      step = 0;
      column += kColumns<S>;
      panels += pitch;
    }
  }
};

// Packs a piece, and says how the next one's may be had ahead.
template <typename S>
struct ByRows {
  const S* weight;  // [count, columns, depth]
  const Products* of;

  // a panel needs too many registers to be packed beside a tile
  static constexpr int64_t kSides = 1;
  void operator()(const Piece& piece, Side<S>& side) const {
    for (int64_t p = 0; p * kColumns<S> < piece.columns; ++p) {
      const S* sources[kColumns<S>];
      for (int64_t c = 0; c < kColumns<S>; ++c) {
        const int64_t column = p * kColumns<S> + c;
        sources[c] = column < piece.columns ? first(piece) + column * of->depth : nullptr;
      }
      pack_rows<S>(sources, piece.terms, side.panels + p * side.pitch);
    }
  }
  Fetch ahead(const Piece& piece, Side<S>&) const {
    return {reinterpret_cast<const char*>(first(piece)), piece.columns,
            piece.terms * int64_t{sizeof(S)}, of->depth * int64_t{sizeof(S)}};
  }
  const S* first(const Piece& piece) const {
    return weight + (piece.matrix * of->columns + piece.column) * of->depth + piece.term;
  }
};
// The same where row_at(j, k) points at term k of column 0.
template <typename S, typename RowAt>
struct ByColumns {
  RowAt row_at;

  // pairs are interleaved beside a tile; a row of floats is copied in as little time as it takes to
  // fetch it there
  static constexpr int64_t kSides = Operand<S>::kDepth;
  void operator()(const Piece& piece, Side<S>& side) const {
    for (int64_t p = 0; p * kColumns<S> < piece.columns; ++p) {
      const int64_t column = piece.column + p * kColumns<S>;
      pack_columns<S, kColumns<S>>(
          [&](int64_t k) { return row_at(piece.matrix, piece.term + k) + column; }, piece.terms,
          std::min(kColumns<S>, piece.columns - p * kColumns<S>), side.panels + p * side.pitch);
    }
  }
  auto ahead(const Piece& piece, Side<S>& side) const {
    if constexpr (kSides == 1)
      return fetched(piece);
    else
      return filled(piece, side);
  }
  Fetch fetched(const Piece& piece) const {
    const auto row = [&](int64_t k) {
      return reinterpret_cast<const char*>(row_at(piece.matrix, piece.term + k) + piece.column);
    };
    // rows need not be equally far apart: what is missed is fetched when it is packed
    return {row(0), piece.terms, piece.columns * int64_t{sizeof(S)},
            (row(piece.terms - 1) - row(0)) / std::max<int64_t>(piece.terms - 1, 1)};
  }
  // nothing for panels that want zeros at their edges
  Fill<S> filled(const Piece& piece, Side<S>& side) const {
    constexpr int64_t kDepth = Operand<S>::kDepth;
    if (piece.columns % kColumns<S> || piece.terms % kDepth) return {};
    side.holds = piece;
    side.terms.resize(piece.terms);
    for (int64_t k = 0; k < piece.terms; ++k) side.terms[k] = row_at(piece.matrix, piece.term + k);
    return {side.terms.data(), piece.terms / kDepth, 0, piece.column,
            piece.columns,     side.pitch,           0, side.panels};
  }
};
template <typename S, typename RowAt>
ByColumns<S, RowAt> by_columns(const RowAt& row_at) {
  return {row_at};
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

}  // namespace deepfusion::inline DF_LEVEL
