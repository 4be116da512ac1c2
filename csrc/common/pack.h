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

// The first `count` of N lanes, widened; zeros beyond them.
template <int64_t N, typename W, typename T>
inline void load_lanes(const T* source, int64_t count, W* lanes) {
  if (count == N) {
    for (int64_t lane = 0; lane < N; ++lane) lanes[lane] = to_wide(source[lane]);
  } else {
    std::fill_n(lanes, N, W(0));
    for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = to_wide(source[lane]);
  }
}

// To nearest even, NaN stays NaN; integers only, so that a loop over it becomes vector code.
inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// The first `count` of N lanes, rounded to T.
template <int64_t N, typename T, typename W>
inline void store_lanes(const W* lanes, int64_t count, T* target) {
  constexpr bool kBits = std::is_same_v<T, BFloat16>;
  alignas(64) std::conditional_t<kBits, uint16_t, T> narrow[N];
#pragma omp simd
  for (int64_t lane = 0; lane < N; ++lane) {
    if constexpr (kBits) {
      narrow[lane] = bfloat16_bits(lanes[lane]);
    } else {
      narrow[lane] = from_wide<T>(lanes[lane]);
    }
  }
  // a copy of known length is a few stores
  if (count == N) {
    std::memcpy(target, narrow, sizeof(T) * N);
  } else {
    std::memcpy(target, narrow, sizeof(T) * count);
  }
}

#if defined(DF_LEVEL_avx512)
[[gnu::always_inline]] inline __m256i round_vector(__m512 lanes) {
  __m256i narrow;
  // not the intrinsic, which only a function compiled for avx512bf16 may use
  asm("vcvtneps2bf16 %1, %0" : "=v"(narrow) : "v"(lanes));
  return narrow;
}
#endif

// The same for all N lanes; S says that this processor rounds to bfloat16 itself.
template <typename S, int64_t N, typename T, typename W>
inline void round_lanes(const W* lanes, T* target) {
#if defined(DF_LEVEL_avx512)
  if constexpr (std::is_same_v<S, BFloat16> && std::is_same_v<T, BFloat16>) {
    for (int64_t lane = 0; lane < N; lane += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + lane),
                          round_vector(_mm512_loadu_ps(lanes + lane)));
    return;
  }
#endif
  store_lanes<N>(lanes, N, target);
}
template <typename S, int64_t N, typename T, typename W>
inline void round_lanes(const W* lanes, int64_t count, T* target) {
  if (count == N) return round_lanes<S, N>(lanes, target);
  alignas(64) T narrow[N];
  round_lanes<S, N>(lanes, narrow);
  std::memcpy(target, narrow, sizeof(T) * count);
}

// Whether rows of this pitch can be written past the cache: whole lines at aligned places.
template <typename T>
inline bool can_stream([[maybe_unused]] const T* target, [[maybe_unused]] int64_t pitch) {
#if defined(DF_LEVEL_avx512)
  return reinterpret_cast<uintptr_t>(target) % 64 == 0 && pitch * sizeof(T) % 64 == 0;
#else
  return false;
#endif
}

// N elements in whole lines, past the cache: a line that is written whole need not be read first.
template <int64_t N, typename T>
inline void stream_copy([[maybe_unused]] const T* source, [[maybe_unused]] T* target) {
#if defined(DF_LEVEL_avx512)
  static_assert(N * sizeof(T) % 64 == 0);
  for (size_t at = 0; at < N * sizeof(T); at += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(reinterpret_cast<char*>(target) + at),
                        _mm512_load_si512(reinterpret_cast<const char*>(source) + at));
  }
#endif
}

// The same for lanes that are rounded to T.
template <typename S, int64_t N, typename T, typename W>
inline void stream_lanes(const W* lanes, T* target) {
#if defined(DF_LEVEL_avx512)
  if constexpr (std::is_same_v<S, BFloat16> && std::is_same_v<T, BFloat16>) {
    static_assert(N % 32 == 0);
    for (int64_t lane = 0; lane < N; lane += 32) {
      // a whole line in a register: halves put together in memory would be read only after every
      // line before has left
      const __m512i line =
          _mm512_inserti64x4(_mm512_zextsi256_si512(round_vector(_mm512_loadu_ps(lanes + lane))),
                             round_vector(_mm512_loadu_ps(lanes + lane + 16)), 1);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target + lane), line);
    }
    return;
  }
#endif
  alignas(64) T narrow[N];
  round_lanes<S, N>(lanes, narrow);
  stream_copy<N>(narrow, target);
}

template <int64_t N, typename T, typename W>
inline void stream_lanes(const W* lanes, T* target) {
  stream_lanes<W, N>(lanes, target);
}

// Before another thread may read what was streamed.
inline void finish_streams() {
#if defined(DF_LEVEL_avx512)
  _mm_sfence();
#endif
}

}  // namespace deepfusion::inline DF_LEVEL
