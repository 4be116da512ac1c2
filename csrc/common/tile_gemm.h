// Small products of tiles that lie in the cache: C (+)= A B in float32 or float64.
//
// A may have any strides (its elements are broadcast, so a transposed A costs nothing); B and C are
// row-major with a width that is a multiple of kTileAlign, padded by the caller.
#pragma once

#include "common/cpu_level.h"

#include <algorithm>
#include <cstdint>

// a namespace of its own: common/gemm.h calls other sizes by the same names
namespace deepfusion::inline DF_LEVEL::tiles {

#if defined(DF_LEVEL_avx512)
constexpr int kVectorBytes = 64;
constexpr int kWidestVectors = 4;
#elif defined(DF_LEVEL_avx2)
constexpr int kVectorBytes = 32;
constexpr int kWidestVectors = 2;
#else
constexpr int kVectorBytes = 16;
constexpr int kWidestVectors = 2;
#endif
// 6 rows x 2 vectors of sums leave room for operands in 16 registers, 6 x 4 in 32
constexpr int kTileRows = 6;
constexpr int64_t kTileAlign = 16;

template <typename W>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

inline int64_t padded(int64_t width) {
  return (width + kTileAlign - 1) / kTileAlign * kTileAlign;
}

template <int ROWS, int VECTORS, typename W>
inline void gemm_block(int64_t depth, const W* a, int64_t a_row, int64_t a_depth, const W* b,
                       int64_t b_row, W* c, int64_t c_row, bool accumulate) {
  using Vector = typename VectorOf<W>::type;
  constexpr int64_t kLanes = kVectorBytes / sizeof(W);
  Vector sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v)
      sums[r][v] =
          accumulate ? *reinterpret_cast<const Vector*>(c + r * c_row + v * kLanes) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[VECTORS];
    for (int v = 0; v < VECTORS; ++v)
      right[v] = *reinterpret_cast<const Vector*>(b + k * b_row + v * kLanes);
    for (int r = 0; r < ROWS; ++r) {
      const W left = a[r * a_row + k * a_depth];
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v)
      *reinterpret_cast<Vector*>(c + r * c_row + v * kLanes) = sums[r][v];
}

template <int VECTORS, typename W>
inline void gemm_columns(int64_t rows, int64_t depth, const W* a, int64_t a_row, int64_t a_depth,
                         const W* b, int64_t b_row, W* c, int64_t c_row, bool accumulate) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    gemm_block<kTileRows, VECTORS>(depth, a + r * a_row, a_row, a_depth, b, b_row, c + r * c_row,
                                   c_row, accumulate);
  for (; r + 2 <= rows; r += 2)
    gemm_block<2, VECTORS>(depth, a + r * a_row, a_row, a_depth, b, b_row, c + r * c_row, c_row,
                           accumulate);
  if (r < rows)
    gemm_block<1, VECTORS>(depth, a + r * a_row, a_row, a_depth, b, b_row, c + r * c_row, c_row,
                           accumulate);
}

// C [rows, width] (+)= A [rows, depth] B [depth, width]; width a multiple of kTileAlign.
template <typename W>
inline void tile_gemm(int64_t rows, int64_t width, int64_t depth, const W* a, int64_t a_row,
                      int64_t a_depth, const W* b, int64_t b_row, W* c, int64_t c_row,
                      bool accumulate) {
  constexpr int64_t kLanes = kVectorBytes / sizeof(W);
  int64_t column = 0;
  for (; column + kWidestVectors * kLanes <= width; column += kWidestVectors * kLanes)
    gemm_columns<kWidestVectors>(rows, depth, a, a_row, a_depth, b + column, b_row, c + column,
                                 c_row, accumulate);
  for (; column + 2 * kLanes <= width; column += 2 * kLanes)
    gemm_columns<2>(rows, depth, a, a_row, a_depth, b + column, b_row, c + column, c_row,
                    accumulate);
  for (; column < width; column += kLanes)
    gemm_columns<1>(rows, depth, a, a_row, a_depth, b + column, b_row, c + column, c_row,
                    accumulate);
}

}  // namespace deepfusion::inline DF_LEVEL::tiles

namespace deepfusion::inline DF_LEVEL {
using tiles::padded;
using tiles::tile_gemm;
}  // namespace deepfusion::inline DF_LEVEL
