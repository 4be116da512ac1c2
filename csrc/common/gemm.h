// Small matrix products from packed panels, for operands whose rows lie anywhere.
//
//   out[i][j] = sum_k A(i, k) B(k, j)      i < kTileRows, j < 2 vectors, k ascending in one
//   accumulator
//
// B is packed: panel[k][j], zeros where a column does not exist. A is read in place through one
// pointer per row, so a gather costs nothing. An element's sum does not depend on where its tile
// lies: any split of the work gives the same bits. Plain C++ with vector extensions; only the
// bfloat16 dot product needs an intrinsic.
#pragma once

#include "common/cpu.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#if defined(DF_LEVEL_avx512)
#include <immintrin.h>
#endif

namespace deepfusion::inline DF_LEVEL {

#if defined(DF_LEVEL_avx512)
constexpr int64_t kVectorBytes = 64;
constexpr int kTileRows = 8;
#elif defined(DF_LEVEL_avx2)
constexpr int64_t kVectorBytes = 32;
constexpr int kTileRows = 4;
#else
constexpr int64_t kVectorBytes = 16;
constexpr int kTileRows = 4;
#endif

// Longer sums are added up in pieces, so that rounding errors of float32 do not grow with the
// number of rows.
constexpr int64_t kSumSteps = 512;

// What a factor is multiplied as. A unit is what one lane holds for one step along k: two
// neighbours for bfloat16.
template <typename S>
struct Operand {
  using Wide = S;
  using Unit [[gnu::may_alias]] = S;
  static constexpr int64_t kDepth = 1;
};
template <>
struct Operand<BFloat16> {
  using Wide = float;
  typedef uint32_t Unit __attribute__((may_alias, aligned(2)));
  static constexpr int64_t kDepth = 2;
};
template <typename S>
using unit_t = typename Operand<S>::Unit;
template <typename S>
constexpr int64_t kLanes = kVectorBytes / sizeof(typename Operand<S>::Wide);
template <typename S>
constexpr int64_t kColumns = 2 * kLanes<S>;
template <typename S>
constexpr int64_t steps_of(int64_t depth) {
  return (depth + Operand<S>::kDepth - 1) / Operand<S>::kDepth;
}

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef T loose __attribute__((vector_size(kVectorBytes), may_alias, aligned(2)));
};

// rows[i][k * step] times panel[k][j]; `first` starts the sums, otherwise they are added to.
template <typename S, int ROWS>
[[gnu::noinline]] void multiply_tile(const unit_t<S>* const* rows, int64_t step,
                                     const unit_t<S>* panel, int64_t steps, bool first, S* out) {
  using Vector = typename VectorOf<S>::type;
  const Vector* b = reinterpret_cast<const Vector*>(panel);
  const S* a[ROWS];
  Vector sums[ROWS][2];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    a[i] = rows[i];
    sums[i][0] = sums[i][1] = Vector{};
  }
  for (int64_t k = 0; k < steps; ++k, b += 2) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      sums[i][0] += a[i][k * step] * b[0];
      sums[i][1] += a[i][k * step] * b[1];
    }
  }
  Vector* target = reinterpret_cast<Vector*>(out);
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    target[2 * i] = first ? sums[i][0] : target[2 * i] + sums[i][0];
    target[2 * i + 1] = first ? sums[i][1] : target[2 * i + 1] + sums[i][1];
  }
}

#if defined(DF_LEVEL_avx512)
inline bool multiplies_bfloat16() {
  return __builtin_cpu_supports("avx512bf16");
}

// The same for pairs of bfloat16: products and sums in float32, two a lane and step.
template <typename S, int ROWS>
  requires std::is_same_v<S, BFloat16>
[[gnu::noinline, gnu::target("avx512bf16")]] void multiply_tile(const unit_t<S>* const* rows,
                                                                int64_t step,
                                                                const unit_t<S>* panel,
                                                                int64_t steps, bool first,
                                                                float* out) {
  const unit_t<S>* a[ROWS];
  __m512 sums[ROWS][2];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    a[i] = rows[i];
    sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < steps; ++k, panel += 32) {
    const __m512bh left = (__m512bh)_mm512_load_si512(panel);
    const __m512bh right = (__m512bh)_mm512_load_si512(panel + 16);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i][k * step]));
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], both, left);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], both, right);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    float* target = out + 32 * i;
    const __m512 none = _mm512_setzero_ps();
    _mm512_store_ps(target, _mm512_add_ps(first ? none : _mm512_load_ps(target), sums[i][0]));
    _mm512_store_ps(target + 16,
                    _mm512_add_ps(first ? none : _mm512_load_ps(target + 16), sums[i][1]));
  }
}
#else
inline bool multiplies_bfloat16() {
  return false;
}
#endif

template <typename S, int ROWS = kTileRows>
inline void multiply_rows(int count, const unit_t<S>* const* rows, int64_t step,
                          const unit_t<S>* panel, int64_t steps, bool first,
                          typename Operand<S>::Wide* out) {
  if (count == ROWS) {
    multiply_tile<S, ROWS>(rows, step, panel, steps, first, out);
  } else if constexpr (ROWS > 1) {
    multiply_rows<S, ROWS - 1>(count, rows, step, panel, steps, first, out);
  }
}

// Rows `stride` bytes apart whose first `bytes` bytes will be wanted next: fetched a part at a time
// while tiles are multiplied, so that packing them does not wait for memory.
struct Ahead {
  const void* base = nullptr;
  int64_t rows = 0;
  int64_t stride = 0;
  int64_t bytes = 0;
  // distance to a second such region, if there is one
  int64_t twin = 0;
  void fetch(int64_t part, int64_t parts) const {
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
      const char* line = static_cast<const char*>(base) + row * stride;
      for (int64_t at = 0; at < bytes; at += 64) {
        __builtin_prefetch(line + at, 0, 3);
        if (twin) __builtin_prefetch(line + at + twin, 0, 3);
      }
    }
  }
};

// All rows against one panel; row_at(i) points at A(i, 0), finish(i, sums) takes each finished row
// of kColumns sums. ahead.fetch(part, parts) is called before each tile.
template <typename S, typename RowAt, typename Next, typename Finish>
inline void sweep(const RowAt& row_at, int64_t num_rows, int64_t step, const unit_t<S>* panel,
                  int64_t steps, const Next& ahead, const Finish& finish) {
  alignas(64) typename Operand<S>::Wide out[kTileRows * kColumns<S>];
  for (int64_t i = 0; i < num_rows; i += kTileRows) {
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, num_rows - i));
    const unit_t<S>* shifted[kTileRows];
    ahead.fetch(i / kTileRows, (num_rows + kTileRows - 1) / kTileRows);
    int64_t k = 0;
    do {
      const int64_t piece = std::min(kSumSteps, steps - k);
      for (int r = 0; r < count; ++r) shifted[r] = row_at(i + r) + k * step;
      multiply_rows<S>(count, shifted, step, panel + k * kColumns<S>, piece, k == 0, out);
      k += piece;
    } while (k < steps);
    for (int r = 0; r < count; ++r) finish(i + r, out + r * kColumns<S>);
  }
}
template <typename S, typename RowAt, typename Finish>
inline void sweep(const RowAt& row_at, int64_t num_rows, int64_t step, const unit_t<S>* panel,
                  int64_t steps, const Finish& finish) {
  sweep<S>(row_at, num_rows, step, panel, steps, Ahead{}, finish);
}

}  // namespace deepfusion::inline DF_LEVEL
