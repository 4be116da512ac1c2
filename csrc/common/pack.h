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
  constexpr int64_t N = kLanes<S>;
  const int64_t steps = steps_of<S>(depth);
  for (int64_t group = 0; group < 2; ++group) {
    const T* const* lanes = sources + group * N;
    for (int64_t k = 0; k < steps; k += N) {
      const int64_t at = k * Operand<S>::kDepth;
      Vector square[N];
#pragma GCC unroll 16
      for (int64_t i = 0; i < N; ++i) {
        square[i] = lanes[i] ? load_units<S, T>(lanes[i] + at, depth - at) : Vector{};
      }
      transpose<Vector, N>(square);
      Vector* target = reinterpret_cast<Vector*>(panel + k * kColumns<S>) + group;
      const int64_t count = std::min(N, steps - k);
      for (int64_t i = 0; i < count; ++i) target[2 * i] = square[i];
    }
  }
}

// panel[k][lane] = row_at(k)[lane] for `count` lanes of WIDTH: columns of a matrix that is
// contiguous across k.
template <typename S, int64_t WIDTH, typename RowAt>
void pack_columns(const RowAt& row_at, int64_t depth, int64_t count, unit_t<S>* panel) {
  using T = std::remove_cvref_t<decltype(*row_at(0))>;
  for (int64_t k = 0; k < depth; k += Operand<S>::kDepth, panel += WIDTH) {
    alignas(64) T padded[2][WIDTH] = {};
    const T* row[2] = {row_at(k), padded[1]};
    if (k + 1 < depth && Operand<S>::kDepth == 2) row[1] = row_at(k + 1);
    if (count < WIDTH) {
      for (int side = 0; side < Operand<S>::kDepth; ++side) {
        for (int64_t lane = 0; lane < count; ++lane) padded[side][lane] = row[side][lane];
        row[side] = padded[side];
      }
    }
    if constexpr (Operand<S>::kDepth == 1) {
      for (int64_t lane = 0; lane < WIDTH; ++lane) panel[lane] = convert<S>(row[0][lane]);
    } else {
      for (int64_t lane = 0; lane < WIDTH; ++lane) {
        panel[lane] = row[0][lane].x | static_cast<uint32_t>(row[1][lane].x) << 16;
      }
    }
  }
}

}  // namespace deepfusion::inline DF_LEVEL
