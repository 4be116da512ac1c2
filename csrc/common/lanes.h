// Lanes of sums to and from memory: widened, rounded, written past the cache.
#pragma once

#include "common/gemm.h"

namespace deepfusion::inline DF_LEVEL {

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
      const __m256i low = round_vector(_mm512_loadu_ps(lanes + lane)),
                    high = round_vector(_mm512_loadu_ps(lanes + lane + 16));
      typedef int64_t Half __attribute__((vector_size(32)));
      const auto line = __builtin_shufflevector((Half)low, (Half)high, 0, 1, 2, 3, 4, 5, 6, 7);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target + lane), (__m512i)line);
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
