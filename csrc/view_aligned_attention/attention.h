// Self-attention over all stages and patches of a sample, head by head, online over tiles of keys.
//
//   S = s Q K^T where the key is valid (and not of a later patch, if causal), else -inf
//   L = logsumexp S      A = exp(S - L)      Y = A V            no valid key: Y = 0, L = +inf
//   delta = rowsum(dY * Y)   dV = A^T dY   dS = A (dY V^T - delta)   dQ = s dS K   dK = s dS^T Q
//
// Tensors are stage-major: token p = (j, i) of sample b is row (j B + b) Q + i.
#pragma once

#include "common/row_blocks.h"
#include "view_aligned_attention/heads.h"
#include "view_aligned_attention/paired_attention.h"

#include <optional>
#include <vector>

namespace deepfusion::inline DF_LEVEL {

using torch::stable::Tensor;

template <typename W>
inline void mask_row(W* scores, const Orders& orders, int32_t limit) {
#pragma omp simd
  for (int64_t k = 0; k < kTile; ++k)
    scores[k] = orders.key[k] <= limit ? scores[k] : -std::numeric_limits<W>::infinity();
}

// Takes one tile of scores into (maximum, sum, accumulator); the scores become weights.
template <typename W>
void online_softmax(W* scores, W& maximum, W& sum, W* accumulator, int64_t wide) {
  W highest = maximum;
#pragma omp simd reduction(max : highest)
  for (int64_t k = 0; k < kTile; ++k) highest = scores[k] > highest ? scores[k] : highest;
  // NOTE: -inf - -inf is NaN: a row that has seen no key yet keeps exponents of 0
  const W shift = highest == -std::numeric_limits<W>::infinity() ? W(0) : highest;
  W total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t k = 0; k < kTile; ++k) {
    scores[k] = exp_fast(scores[k] - shift);
    total += scores[k];
  }
  const W fade = exp_fast(maximum - shift);
  sum = sum * fade + total;
  maximum = highest;
  if (fade != W(1))
    for (int64_t c = 0; c < wide; ++c) accumulator[c] *= fade;
}

template <typename T>
void forward_tile(const Head& at, const T* qkv, int64_t first, Workspace<wide_t<T>>& work, T* y,
                  wide_t<T>* lse) {
  using W = wide_t<T>;
  const int64_t wide = padded(at.width), dim = at.heads * at.width, tokens = at.tokens();
  const int64_t rows = std::min(kTile, tokens - first);
  W *query = work[0], *key = work[1], *value = work[2], *sums = work[3], *key_t = work[4],
    *scores = work.scores(0);
  W maximum[kTile], total[kTile] = {};
  std::fill_n(maximum, kTile, -std::numeric_limits<W>::infinity());
  std::fill_n(sums, kTile * wide, W(0));
  const T* head = qkv + at.head * at.width;
  load_tile(at, head, 3 * dim, first, rows, static_cast<W>(at.scale), query);
  for (int64_t k = 0; k < tokens; k += kTile) {
    const int64_t keys = std::min(kTile, tokens - k);
    const Orders orders(at, k, keys);
    if (orders.hidden_from(at, first, rows)) continue;
    load_tile(at, head + dim, 3 * dim, k, keys, W(1), key);
    load_tile(at, head + 2 * dim, 3 * dim, k, keys, W(1), value);
    transpose_tile(key, at.width, key_t);
    tile_gemm(rows, kTile, at.width, query, wide, int64_t(1), key_t, kTile, scores, kTile, false);
    for (int64_t r = 0; r < rows; ++r) {
      mask_row(scores + r * kTile, orders, at.limit(first + r));
      online_softmax(scores + r * kTile, maximum[r], total[r], sums + r * wide, wide);
    }
    tile_gemm(rows, wide, keys, scores, kTile, int64_t(1), value, wide, sums, wide, true);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const W share = total[r] == 0 ? W(0) : W(1) / total[r];
    for (int64_t c = 0; c < wide; ++c) sums[r * wide + c] *= share;
    lse[at.stat(first + r)] =
        total[r] == 0 ? std::numeric_limits<W>::infinity() : maximum[r] + std::log(total[r]);
  }
  store_tile(at, sums, first, rows, W(1), y + at.head * at.width, dim);
}

// dS and A of one tile: scores and dA [rows, kTile] become A and dS.
template <typename W>
void score_gradient(const Head& at, const Orders& orders, int64_t first, int64_t rows, const W* lse,
                    const W* delta, W* scores, W* dscores) {
  for (int64_t r = 0; r < rows; ++r) {
    W *weight = scores + r * kTile, *gradient = dscores + r * kTile;
    const W shift = lse[at.stat(first + r)], mean = delta[at.stat(first + r)];
    mask_row(weight, orders, at.limit(first + r));
#pragma omp simd
    for (int64_t k = 0; k < kTile; ++k) {
      weight[k] = exp_fast(weight[k] - shift);
      gradient[k] = weight[k] * (gradient[k] - mean);
    }
  }
}

template <typename T>
struct Gradients {
  const T *qkv, *dy;
  const wide_t<T>*lse, *delta;
  wide_t<T> upstream;
  T* dqkv;
};

// One head whole: tiles of keys outside, of queries inside; dQ gathers in its own buffer, so
// nothing is shared.
template <typename T>
void backward_head(const Head& at, const Gradients<T>& of, Workspace<wide_t<T>>& work,
                   std::vector<wide_t<T>>& dqueries) {
  using W = wide_t<T>;
  const int64_t wide = padded(at.width), dim = at.heads * at.width, tokens = at.tokens();
  W *query = work[0], *key = work[1], *value = work[2], *dout = work[3], *dkey = work[4],
    *dvalue = work[5];
  W *key_t = work[6], *value_t = work[7], *scores = work.scores(0), *dscores = work.scores(1);
  const T* head = of.qkv + at.head * at.width;
  T* dhead = of.dqkv + at.head * at.width;
  const int64_t one = 1;
  const W scale = static_cast<W>(at.scale);
  dqueries.assign(tokens * wide, W(0));
  for (int64_t k = 0; k < tokens; k += kTile) {
    const int64_t keys = std::min(kTile, tokens - k);
    const Orders orders(at, k, keys);
    load_tile(at, head + dim, 3 * dim, k, keys, W(1), key);
    load_tile(at, head + 2 * dim, 3 * dim, k, keys, W(1), value);
    transpose_tile(key, at.width, key_t);
    transpose_tile(value, at.width, value_t);
    std::fill_n(dkey, work.tile, W(0));
    std::fill_n(dvalue, work.tile, W(0));
    for (int64_t q = 0; q < tokens; q += kTile) {
      const int64_t rows = std::min(kTile, tokens - q);
      if (orders.hidden_from(at, q, rows)) continue;
      load_tile(at, head, 3 * dim, q, rows, scale, query);
      load_tile(at, of.dy + at.head * at.width, dim, q, rows, W(1), dout);
      tile_gemm(rows, kTile, at.width, query, wide, one, key_t, kTile, scores, kTile, false);
      tile_gemm(rows, kTile, at.width, dout, wide, one, value_t, kTile, dscores, kTile, false);
      score_gradient(at, orders, q, rows, of.lse, of.delta, scores, dscores);
      tile_gemm(keys, wide, rows, scores, one, kTile, dout, wide, dvalue, wide, true);
      tile_gemm(keys, wide, rows, dscores, one, kTile, query, wide, dkey, wide, true);
      tile_gemm(rows, wide, keys, dscores, kTile, one, key, wide, dqueries.data() + q * wide, wide,
                true);
    }
    store_tile(at, dkey, k, keys, of.upstream, dhead + dim, 3 * dim);
    store_tile(at, dvalue, k, keys, of.upstream, dhead + 2 * dim, 3 * dim);
  }
  for (int64_t q = 0; q < tokens; q += kTile)
    store_tile(at, dqueries.data() + q * wide, q, std::min(kTile, tokens - q), of.upstream * scale,
               dhead, 3 * dim);
}

// qkv [J, B, Q, 3 D]
inline Head head_at(const Tensor& qkv, const std::optional<Tensor>& valid, int64_t heads,
                    bool causal, double scale, int64_t task) {
  const int64_t width = qkv.size(3) / 3 / heads;
  return {qkv.size(0), qkv.size(1),  qkv.size(2),  heads,
          width,       task / heads, task % heads, valid ? valid->const_data_ptr<bool>() : nullptr,
          causal,      scale};
}

template <typename T>
void forward_heads(const Tensor& qkv, const std::optional<Tensor>& valid, int64_t heads,
                   bool causal, double scale, T* y, Tensor& lse) {
  using W = wide_t<T>;
  const int64_t tokens = qkv.size(0) * qkv.size(2), tiles = (tokens + kTile - 1) / kTile;
  const T* source = qkv.const_data_ptr<T>();
  W* stats = lse.mutable_data_ptr<W>();
#if defined(DF_LEVEL_avx512)
  if constexpr (std::is_same_v<T, BFloat16>)
    if (const int64_t width = qkv.size(3) / 3 / heads; multiplies_pairs(width))
      return for_stolen(qkv.size(1) * heads * tiles, [&](const auto& each) {
        const PairedWork work(width, 5);
        each([&](int64_t task) {
          const Head at = head_at(qkv, valid, heads, causal, scale, task / tiles);
          forward_pairs(at, source, task % tiles * kTile, work, y, stats);
        });
      });
#endif
  for_stolen(qkv.size(1) * heads * tiles, [&](const auto& each) {
    Workspace<W> work(qkv.size(3) / 3 / heads, 4);
    each([&](int64_t task) {
      const Head at = head_at(qkv, valid, heads, causal, scale, task / tiles);
      forward_tile(at, source, task % tiles * kTile, work, y, stats);
    });
  });
}

template <typename T>
void backward_heads(const Tensor& qkv, const std::optional<Tensor>& valid, int64_t heads,
                    bool causal, double scale, const Gradients<T>& of) {
  using W = wide_t<T>;
#if defined(DF_LEVEL_avx512)
  if constexpr (std::is_same_v<T, BFloat16>)
    if (const int64_t width = qkv.size(3) / 3 / heads; multiplies_pairs(width))
      return for_stolen(qkv.size(1) * heads, [&](const auto& each) {
        const PairedWork work(width, 9);
        PairedQueries queries(work, qkv.size(0) * qkv.size(2));
        each([&](int64_t task) {
          backward_pairs(head_at(qkv, valid, heads, causal, scale, task), of, work, queries);
        });
      });
#endif
  for_stolen(qkv.size(1) * heads, [&](const auto& each) {
    Workspace<W> work(qkv.size(3) / 3 / heads, 6);
    std::vector<W> dqueries;
    each([&](int64_t task) {
      backward_head(head_at(qkv, valid, heads, causal, scale, task), of, work, dqueries);
    });
  });
}

}  // namespace deepfusion::inline DF_LEVEL
