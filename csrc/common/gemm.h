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

// What a tile does beside its products, one piece every kChoreSteps steps: its own arithmetic
// leaves most of the processor's other units idle, whereas a burst of misses before or after it
// would stop the products. A chore has `left` pieces and does one at a time.
constexpr int64_t kChoreSteps = 4;
struct NoChore {
  static constexpr int64_t left = 0;
  void one() {}
};

// Cache lines that will be wanted later: `left` pairs, `twin` bytes apart, the pairs `stride` bytes
// apart.
struct Lines {
  const char* at = nullptr;
  int64_t left = 0;
  int64_t stride = 64;
  int64_t twin = 0;
  void one() {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + twin, 0, 2);
    at += stride;
    --left;
  }
};

// rows[i][k * step] times panel[k][j]; `first` starts the sums, otherwise they are added to.
template <typename S, int ROWS, typename Chore>
[[gnu::noinline]] void multiply_tile(const unit_t<S>* const* rows, int64_t step,
                                     const unit_t<S>* panel, int64_t steps, bool first, S* out,
                                     Chore& chore) {
  using Vector = typename VectorOf<S>::type;
  const Vector* b = reinterpret_cast<const Vector*>(panel);
  const S* a[ROWS];
  Vector sums[ROWS][2];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    a[i] = rows[i];
    sums[i][0] = sums[i][1] = Vector{};
  }
  int64_t k = 0;
  // a copy, else every piece would go through memory
  Chore mine = chore;
  while (mine.left > 0 && k + kChoreSteps <= steps) {
    mine.one();
#pragma GCC unroll 1
    for (int64_t u = 0; u < kChoreSteps; ++u, ++k, b += 2) {
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        sums[i][0] += a[i][k * step] * b[0];
        sums[i][1] += a[i][k * step] * b[1];
      }
    }
  }
  for (; k < steps; ++k, b += 2) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      sums[i][0] += a[i][k * step] * b[0];
      sums[i][1] += a[i][k * step] * b[1];
    }
  }
  chore = mine;
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
template <typename S, int ROWS, typename Chore>
  requires std::is_same_v<S, BFloat16>
[[gnu::noinline, gnu::target("avx512bf16")]] void multiply_tile(const unit_t<S>* const* rows,
                                                                int64_t step,
                                                                const unit_t<S>* panel,
                                                                int64_t steps, bool first,
                                                                float* out, Chore& chore) {
  const unit_t<S>* a[ROWS];
  __m512 sums[ROWS][2];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    a[i] = rows[i];
    sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  }
  int64_t k = 0;
  // a copy, else every piece would go through memory
  Chore mine = chore;
  while (mine.left > 0 && k + kChoreSteps <= steps) {
    mine.one();
#pragma GCC unroll 1
    for (int64_t u = 0; u < kChoreSteps; ++u, ++k, panel += 32) {
      const __m512bh left = (__m512bh)_mm512_load_si512(panel);
      const __m512bh right = (__m512bh)_mm512_load_si512(panel + 16);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i][k * step]));
        sums[i][0] = _mm512_dpbf16_ps(sums[i][0], both, left);
        sums[i][1] = _mm512_dpbf16_ps(sums[i][1], both, right);
      }
    }
  }
  for (; k < steps; ++k, panel += 32) {
    const __m512bh left = (__m512bh)_mm512_load_si512(panel);
    const __m512bh right = (__m512bh)_mm512_load_si512(panel + 16);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i][k * step]));
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], both, left);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], both, right);
    }
  }
  chore = mine;
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

template <typename S, int ROWS = kTileRows, typename Chore>
inline void multiply_rows(int count, const unit_t<S>* const* rows, int64_t step,
                          const unit_t<S>* panel, int64_t steps, bool first,
                          typename Operand<S>::Wide* out, Chore& chore) {
  if (count == ROWS) {
    multiply_tile<S, ROWS>(rows, step, panel, steps, first, out, chore);
  } else if constexpr (ROWS > 1) {
    multiply_rows<S, ROWS - 1>(count, rows, step, panel, steps, first, out, chore);
  }
}

template <typename S>
inline void multiply_rows(int count, const unit_t<S>* const* rows, int64_t step,
                          const unit_t<S>* panel, int64_t steps, bool first,
                          typename Operand<S>::Wide* out) {
  NoChore none;
  multiply_rows<S>(count, rows, step, panel, steps, first, out, none);
}

// Rows `stride` bytes apart whose first `bytes` bytes will be wanted next: a part of them for each
// tile, so that packing them does not wait for memory.
struct Ahead {
  const void* base = nullptr;
  int64_t rows = 0;
  int64_t stride = 0;
  int64_t bytes = 0;
  // distance to a second such region, if there is one
  int64_t twin = 0;
  Lines operator()(int64_t, int64_t part, int64_t parts) const {
    const bool is_solid = stride == bytes;
    const int64_t pairs = is_solid ? rows * bytes / (twin ? 64 : 128) : rows;
    const int64_t step = is_solid ? (twin ? 64 : 128) : stride;
    const int64_t first = pairs * part / parts;
    return {static_cast<const char*>(base) + first * step, pairs * (part + 1) / parts - first, step,
            is_solid && twin ? twin : std::min<int64_t>(64, bytes)};
  }
};

// All rows against one panel; row_at(i) points at A(i, 0), finish(i, sums) takes each finished row
// of kColumns sums. before(i, part, parts) is called before the tile of rows from i on and returns
// the chore that is done meanwhile.
template <typename S, typename RowAt, typename Before, typename Finish>
inline void sweep(const RowAt& row_at, int64_t num_rows, int64_t step, const unit_t<S>* panel,
                  int64_t steps, const Before& before, const Finish& finish) {
  alignas(64) typename Operand<S>::Wide out[kTileRows * kColumns<S>];
  const int64_t parts = (num_rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < num_rows; i += kTileRows) {
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, num_rows - i));
    const unit_t<S>* shifted[kTileRows];
    auto chore = before(i, i / kTileRows, parts);
    int64_t k = 0;
    do {
      const int64_t piece = std::min(kSumSteps, steps - k);
      for (int r = 0; r < count; ++r) shifted[r] = row_at(i + r) + k * step;
      multiply_rows<S>(count, shifted, step, panel + k * kColumns<S>, piece, k == 0, out, chore);
      k += piece;
    } while (k < steps);
    while (chore.left > 0) chore.one();
    for (int r = 0; r < count; ++r) finish(i + r, out + r * kColumns<S>);
  }
}
template <typename S, typename RowAt, typename Finish>
inline void sweep(const RowAt& row_at, int64_t num_rows, int64_t step, const unit_t<S>* panel,
                  int64_t steps, const Finish& finish) {
  sweep<S>(
      row_at, num_rows, step, panel, steps, [](int64_t, int64_t, int64_t) { return NoChore(); },
      finish);
}

}  // namespace deepfusion::inline DF_LEVEL
