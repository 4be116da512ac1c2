// What both backward kernels share: the call, what is known of a row, and one tile of A and dS.
#pragma once

#include "view_aligned_attention/attention.cuh"

namespace deepfusion {
inline namespace device {

struct BackwardCall {
  const void *qkv, *dy;
  const float *lse, *delta, *upstream;
  void* dqkv;
  Head head;
  float scale;
};

// Of keys their orders; of queries their limits (in the same place), L in base 2, and delta.
struct RowStats {
  static constexpr int kBytes = 12;
  int* orders;
  float *lse, *delta;

  __device__ RowStats(unsigned char* memory, int rows)
      : orders(reinterpret_cast<int*>(memory)),
        lse(reinterpret_cast<float*>(memory) + rows),
        delta(reinterpret_cast<float*>(memory) + 2 * rows) {}
  __device__ RowStats(int* orders, float* lse, float* delta)
      : orders(orders), lse(lse), delta(delta) {}
  __device__ RowStats from(int row) const { return {orders + row, lse + row, delta + row}; }
};

// A query that does not exist (token < 0) sees nothing.
__device__ __forceinline__ void load_query_stats(const BackwardCall& call, const Head& head,
                                                 int token, const RowStats& stats, int r) {
  const bool exists = token >= 0;
  stats.orders[r] = exists ? head.limit(token % head.patches) : -1;
  stats.lse[r] = exists ? call.lse[head.stat(token)] * kLog2E : INFINITY;
  stats.delta[r] = exists ? call.delta[head.stat(token)] : 0.0f;
}

// One tile, rows by columns: keys by queries or queries by keys, each with what multiplies it in
// dY V^T. A (if keys are the rows) and dS to shared memory.
template <typename T, int kWidth, bool kKeysAreRows, int kScorePitch,
          bool kKeepsWeights = kKeysAreRows>
__device__ __forceinline__ void score_tile(const T* rows, const T* rows_too, const T* columns,
                                           const T* columns_too, const RowStats& of_rows,
                                           const RowStats& of_columns, float scale,
                                           const Places<T>& places, T* weights, T* dscores) {
  constexpr int kPitch = pitch_of<T>(kWidth);
  Sums<T> scores[1], products[1];
  clear(scores);
  clear(products);
  multiply<Along::kRows, Along::kColumns, kWidth, 1, T>(scores, rows, kPitch, columns, kPitch);
  multiply<Along::kRows, Along::kColumns, kWidth, 1, T>(products, rows_too, kPitch, columns_too,
                                                        kPitch);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int row = places.row(i), column = places.column(i);
    const int key = kKeysAreRows ? row : column, query = kKeysAreRows ? column : row;
    const RowStats &of_keys = kKeysAreRows ? of_rows : of_columns,
                   &of_queries = kKeysAreRows ? of_columns : of_rows;
    const bool is_seen = of_keys.orders[key] <= of_queries.orders[query];
    const float weight = is_seen ? exp2f(scores[0].x[i] * scale - of_queries.lse[query]) : 0.0f;
    if constexpr (kKeepsWeights) weights[row * kScorePitch + column] = from_float<T>(weight);
    dscores[row * kScorePitch + column] =
        from_float<T>(weight * (products[0].x[i] - of_queries.delta[query]));
  }
}

}  // namespace device
}  // namespace deepfusion
