// Products of a warp on the host: fragments of 16 x 16 that lanes hold together, in a layout of our
// own that no kernel can guess.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16, "the one shape that is served");
  static constexpr int num_elements = 8;
  T x[num_elements];
};

// Row-major place in the matrix of element i of a lane: a permutation, as 37 is odd.
inline unsigned df_place(unsigned lane, int i) {
  return (lane * 8 + i) * 37 % 256;
}

template <typename T>
inline void df_check(const T* memory, unsigned pitch) {
  if (reinterpret_cast<uintptr_t>(memory) % 32 != 0 || pitch * sizeof(T) % 16 != 0)
    cuda_on_host::refuse("a fragment wants addresses of 32 and pitches of 16 bytes");
}

inline size_t df_offset(int i, unsigned pitch, bool by_rows) {
  const unsigned place = df_place(cuda_on_host::lane(), i), row = place / 16, column = place % 16;
  return by_rows ? size_t{row} * pitch + column : size_t{column} * pitch + row;
}

// NOTE: no lane waits here: who reads what another lane wrote has to wait for it by itself.
template <typename Use, typename T, typename Layout>
inline void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from,
                             unsigned pitch) {
  df_check(from, pitch);
  for (int i = 0; i < 8; ++i)
    to.x[i] = from[df_offset(i, pitch, std::is_same_v<Layout, row_major>)];
}
template <typename T>
inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, T>& to, const T* from,
                             unsigned pitch, layout_t layout) {
  df_check(from, pitch);
  for (int i = 0; i < 8; ++i) to.x[i] = from[df_offset(i, pitch, layout == mem_row_major)];
}
template <typename T>
inline void store_matrix_sync(T* to, const fragment<accumulator, 16, 16, 16, T>& from,
                              unsigned pitch, layout_t layout) {
  df_check(to, pitch);
  for (int i = 0; i < 8; ++i) to[df_offset(i, pitch, layout == mem_row_major)] = from.x[i];
}
template <typename Fragment, typename T>
inline void fill_fragment(Fragment& fragment, T value) {
  for (auto& element : fragment.x) element = value;
}

inline float df_wide(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
inline float df_wide(__half value) {
  return __half2float(value);
}

// The first lane that all have come to multiplies for all of them, before any goes on.
template <typename A, typename B, typename C>
inline void mma_sync(C& d, const A& a, const B& b, const C& c) {
  struct Job {
    const A* a;
    const B* b;
    const C* c;
    C* d;
    bool is_done;
  } job{&a, &b, &c, &d, false};
  const auto multiply = [&job](const auto& lanes) {
    if (job.is_done) return 0;
    alignas(64) float left[256], right[256], sums[256];
    for (unsigned lane = 0; lane < 32; ++lane) {
      const Job& of = *reinterpret_cast<const Job*>(lanes[lane]);
      for (int i = 0; i < 8; ++i) {
        const unsigned place = df_place(lane, i);
        left[place] = df_wide(of.a->x[i]);
        right[place] = df_wide(of.b->x[i]);
        sums[place] = of.c->x[i];
      }
    }
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 16; ++column)
          sums[row * 16 + column] += left[row * 16 + k] * right[k * 16 + column];
    for (unsigned lane = 0; lane < 32; ++lane) {
      Job& of = *reinterpret_cast<Job*>(lanes[lane]);
      for (int i = 0; i < 8; ++i) of.d->x[i] = sums[df_place(lane, i)];
      of.is_done = true;
    }
    return 0;
  };
  cuda_on_host::exchange(cuda_on_host::Meeting::kProduct, 0xffffffffu,
                         reinterpret_cast<uint64_t>(&job), multiply);
}

}  // namespace nvcuda::wmma
