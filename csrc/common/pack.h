// Packs the factors of common/gemm.h: panel[k][lane], widened or paired as the operand type wants.
#pragma once

#include "common/gemm.h"

namespace deepfusion::inline DF_LEVEL {

template <typename Vector, size_t... I>
inline Vector interleave_low(Vector a, Vector b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * sizeof...(I))...);
}
template <typename Vector, size_t... I>
inline Vector interleave_high(Vector a, Vector b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, ((sizeof...(I) + I) / 2 + (I % 2) * sizeof...(I))...);
}

// A square of N vectors transposed in registers: log2 N rounds of interleaving row i with row i + N
// / 2.
template <typename Vector, int N>
[[gnu::always_inline]] inline void transpose(Vector (&square)[N]) {
  constexpr auto lanes = std::make_index_sequence<N>();
#pragma GCC unroll 4
  for (int round = 1; round < N; round *= 2) {
    Vector next[N];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      next[2 * i] = interleave_low(square[i], square[i + N / 2], lanes);
      next[2 * i + 1] = interleave_high(square[i], square[i + N / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) square[i] = next[i];
  }
}

template <typename S, typename T>
inline S convert(T x) {
  if constexpr (std::is_same_v<S, T>) {
    return x;
  } else {
    return static_cast<S>(to_wide(x));
  }
}

// One vector of units from a row: `left` elements remain, zeros beyond them.
template <typename S, typename T>
inline typename VectorOf<typename Operand<S>::Wide>::type load_units(const T* source,
                                                                     int64_t left) {
  constexpr int64_t kElements = kLanes<S> * Operand<S>::kDepth;
  if constexpr (std::is_same_v<S, T>) {
    if (left >= kElements)
      return *reinterpret_cast<const typename VectorOf<typename Operand<S>::Wide>::loose*>(source);
  }
  alignas(64) S elements[kElements] = {};
  const int64_t count = std::min(left, kElements);
  for (int64_t i = 0; i < count; ++i) elements[i] = convert<S>(source[i]);
  return *reinterpret_cast<const typename VectorOf<typename Operand<S>::Wide>::type*>(elements);
}

// panel[k][lane] = sources[lane][k]: rows of a weight that is contiguous along k. A null source is
// a lane of zeros.
template <typename S, typename T>
void pack_rows(const T* const* sources, int64_t depth, unit_t<S>* panel) {
  using Vector = typename VectorOf<typename Operand<S>::Wide>::type;
  constexpr int64_t N = kLanes<S>, kElements = N * Operand<S>::kDepth;
  const int64_t steps = steps_of<S>(depth);
  for (int64_t group = 0; group < 2; ++group) {
    const T* const* lanes = sources + group * N;
    const bool is_whole = std::find(lanes, lanes + N, nullptr) == lanes + N;
    int64_t k = 0;
    // whole squares without a branch, so that they stay in registers
    if constexpr (std::is_same_v<S, T>) {
      using Loose = typename VectorOf<typename Operand<S>::Wide>::loose;
      for (; is_whole && k * Operand<S>::kDepth + kElements <= depth; k += N) {
        Vector square[N];
#pragma GCC unroll 16
        for (int64_t i = 0; i < N; ++i)
          square[i] = *reinterpret_cast<const Loose*>(lanes[i] + k * Operand<S>::kDepth);
        transpose<Vector, N>(square);
        Vector* target = reinterpret_cast<Vector*>(panel + k * kColumns<S>) + group;
#pragma GCC unroll 16
        for (int64_t i = 0; i < N; ++i) target[2 * i] = square[i];
      }
    }
    for (; k < steps; k += N) {
      const int64_t left = depth - k * Operand<S>::kDepth;
      Vector square[N];
      for (int64_t i = 0; i < N; ++i) {
        square[i] = lanes[i] ? load_units<S, T>(lanes[i] + k * Operand<S>::kDepth, left) : Vector{};
      }
      transpose<Vector, N>(square);
      Vector* target = reinterpret_cast<Vector*>(panel + k * kColumns<S>) + group;
      const int64_t count = std::min(N, steps - k);
      for (int64_t i = 0; i < count; ++i) target[2 * i] = square[i];
    }
  }
}

template <int64_t WIDTH, typename T>
inline void load_row(const T* source, int64_t count, T* row) {
  if (count == WIDTH) {
    std::memcpy(row, source, sizeof(T) * WIDTH);
  } else {
    std::memset(row, 0, sizeof(T) * WIDTH);
    std::memcpy(row, source, sizeof(T) * count);
  }
}

// panel[k][lane] = row_at(k)[lane] for `count` lanes of WIDTH: columns of a matrix that is
// contiguous across k.
template <typename S, int64_t WIDTH, typename RowAt>
void pack_columns(const RowAt& row_at, int64_t depth, int64_t count, unit_t<S>* panel) {
  using T = std::remove_cvref_t<decltype(*row_at(0))>;
  constexpr int64_t kDepth = Operand<S>::kDepth;
  for (int64_t k = 0; k < depth; k += kDepth, panel += WIDTH) {
    // copies of known length: the panel may alias anything, so values read through pointers would
    // be read one by one
    T row[WIDTH];
    load_row<WIDTH>(row_at(k), count, row);
    if constexpr (kDepth == 1) {
      for (int64_t lane = 0; lane < WIDTH; ++lane) panel[lane] = convert<S>(row[lane]);
    } else {
      T below[WIDTH] = {};
      if (k + 1 < depth) load_row<WIDTH>(row_at(k + 1), count, below);
      typedef uint16_t Lanes __attribute__((vector_size(WIDTH * 2)));
      const Lanes a = std::bit_cast<Lanes>(row), b = std::bit_cast<Lanes>(below);
      constexpr auto lanes = std::make_index_sequence<WIDTH>();
      const Lanes pairs[2] = {interleave_low(a, b, lanes), interleave_high(a, b, lanes)};
      std::memcpy(panel, pairs, sizeof(pairs));
    }
  }
}

// Rows `pitch` elements apart to steps of a panel, whole width; what lies `reach` elements further
// is fetched for the next tile.
template <typename S>
struct CopyRows {
  const S* from = nullptr;
  int64_t left = 0;
  int64_t pitch = 0;
  int64_t reach = 0;
  unit_t<S>* to = nullptr;
  void one() {
    constexpr int64_t kDepth = Operand<S>::kDepth;
    pack_columns<S, kColumns<S>>([this](int64_t k) { return from + k * pitch; }, kDepth,
                                 kColumns<S>, to);
    __builtin_prefetch(from + reach, 0, 2);
    __builtin_prefetch(kDepth > 1 ? from + reach + pitch : from + reach + kLanes<S>, 0, 2);
    from += kDepth * pitch;
    to += kColumns<S>;
    --left;
  }
};

// The next panel of columns, packed a chunk at a time while the tiles of this one are multiplied.
// Rows that lie a power of two apart share a few sets of the cache: a whole strip fetched ahead
// would push itself out.
template <typename S, typename T>
struct PackAhead {
  const T* source;
  int64_t depth;
  int64_t pitch;
  // columns from `source` on, none if negative; a panel takes the first kColumns
  int64_t columns;
  unit_t<S>* panel;
  CopyRows<S> operator()(int64_t, int64_t part, int64_t parts) const {
    constexpr int64_t kDepth = Operand<S>::kDepth;
    if (columns <= 0) return {};
    const int64_t chunk = ((depth + parts - 1) / parts + 1) / 2 * 2;
    const int64_t begin = std::min(depth, part * chunk), end = std::min(depth, begin + chunk);
    unit_t<S>* target = panel + begin / kDepth * kColumns<S>;
    if constexpr (std::is_same_v<S, T>) {
      if (columns >= kColumns<S> && (end - begin) % kDepth == 0) {
        const bool is_last = part + 1 == parts;
        return {source + begin * pitch, (end - begin) / kDepth, pitch,
                is_last ? kColumns<S> - begin * pitch : chunk * pitch, target};
      }
    }
    pack_columns<S, kColumns<S>>([&](int64_t k) { return source + (begin + k) * pitch; },
                                 end - begin, std::min(kColumns<S>, columns), target);
    return {};
  }
};

// Rows [i, i + kTileRows) of at most `rows`, `pitch` elements apart, of which `count` elements are
// read or written when a tile is finished: on their way while it is multiplied.
template <typename T>
inline void touch_rows(const T* base, int64_t pitch, int64_t i, int64_t rows, int64_t count) {
  for (int64_t row = i; row < std::min<int64_t>(rows, i + kTileRows); ++row) {
    const char* line = reinterpret_cast<const char*>(base + row * pitch);
    for (int64_t at = 0; at < count * int64_t{sizeof(T)}; at += 64) __builtin_prefetch(line + at);
  }
}

}  // namespace deepfusion::inline DF_LEVEL
