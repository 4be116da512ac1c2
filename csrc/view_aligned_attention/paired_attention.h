// The attention of attention.h where the processor multiplies pairs of bfloat16: rows of Q, K, V
// and dY are read where they lie, A and dS are rounded to bfloat16 before they are multiplied.
//
// Sums of a tile of rows stand in blocks [group of 8 rows][32 columns][8][32], as products write
// them.
#pragma once

#include "common/lanes.h"
#include "common/panels.h"
#include "common/vector_math.h"
#include "view_aligned_attention/heads.h"

#if defined(DF_LEVEL_avx512)
namespace deepfusion::inline DF_LEVEL {

constexpr int64_t kHalf = kColumns<BFloat16>;
static_assert(kTile == 2 * kHalf && kTile % kTileRows == 0);
using Pair = unit_t<BFloat16>;

inline bool multiplies_pairs(int64_t width) {
  return multiplies_bfloat16() && width % 2 == 0;
}

// Where up to kTile rows of one tile begin; null beyond the last.
struct TileRows {
  const BFloat16* at[kTile] = {};

  TileRows(const Head& head, const BFloat16* base, int64_t stride, int64_t first, int64_t count) {
    Walk walk(head, first);
    for (int64_t r = 0; r < count; ++r, walk.next()) at[r] = base + walk.row * stride;
  }
  const Pair* pairs(int64_t r) const { return as_units<BFloat16>(at[r]); }
};

// Sums of up to kTile rows.
struct Blocks {
  float* memory;
  int64_t panels;

  float* row(int64_t r, int64_t panel) const {
    return memory + ((r / kTileRows * panels + panel) * kTileRows + r % kTileRows) * kHalf;
  }
};

// One thread's memory, in floats and in pairs, which are as large.
struct PairedWork {
  static constexpr int64_t kSquare = kTile * kTile;
  int64_t width, panels, depth_panel, tile_panel;
  Aligned<float> memory;

  PairedWork(int64_t wide, int64_t parts)
      : width(wide),
        panels((wide + kHalf - 1) / kHalf),
        depth_panel(wide / 2 * kHalf),
        tile_panel(kHalf * kHalf),
        memory(parts * part()) {}
  // room for anything that one tile needs: panels of its rows or columns, sums, squares
  int64_t part() const {
    return std::max({kSquare, 2 * depth_panel, panels * tile_panel, panels * kTile * kHalf});
  }
  float* floats(int64_t index) const { return memory.get() + index * part(); }
  Pair* pairs(int64_t index) const { return reinterpret_cast<Pair*>(floats(index)); }
  BFloat16* narrow(int64_t index) const { return reinterpret_cast<BFloat16*>(floats(index)); }

  // halves of a tile's rows as columns: what a row of Q or dY meets
  void pack_across(const TileRows& rows, Pair* to) const {
    for (int64_t half = 0; half < 2; ++half)
      pack_rows<BFloat16>(rows.at + half * kHalf, width, to + half * depth_panel);
  }
  // a tile's rows in pairs, one below the other: what a row of A or dS meets
  void pack_along(const TileRows& rows, int64_t count, Pair* to) const {
    for (int64_t p = 0; p < panels; ++p)
      pack_columns<BFloat16, kHalf>([&](int64_t r) { return rows.at[r] + p * kHalf; }, count,
                                    std::min(kHalf, width - p * kHalf), to + p * tile_panel);
  }
};

// out[r] (+)= sum_k row_at(r)[k step] panel[k] for every panel
template <typename RowAt>
void multiply_blocks(int64_t rows, const RowAt& row_at, int64_t step, int64_t steps,
                     const Pair* panel, int64_t pitch, bool first, const Blocks& out) {
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, rows - r));
    const Pair* left[kTileRows];
    for (int i = 0; i < count; ++i) left[i] = row_at(r + i);
    for (int64_t p = 0; p < out.panels; ++p)
      multiply_rows<BFloat16>(count, left, step, panel + p * pitch, steps, first, out.row(r, p));
  }
}

inline void store_blocks(const Head& at, const Blocks& sums, int64_t first, int64_t count,
                         float factor, BFloat16* base, int64_t row_stride) {
  Walk walk(at, first);
  for (int64_t r = 0; r < count; ++r, walk.next())
    for (int64_t p = 0; p < sums.panels; ++p) {
      alignas(64) float lanes[kHalf];
      const float* row = sums.row(r, p);
      for (int64_t c = 0; c < kHalf; ++c) lanes[c] = row[c] * factor;
      round_lanes<BFloat16, kHalf>(lanes, std::min(kHalf, at.width - p * kHalf),
                                   base + walk.row * row_stride + p * kHalf);
    }
}

inline void scale_row(const Blocks& sums, int64_t r, float factor) {
  for (int64_t p = 0; p < sums.panels; ++p)
    for (int64_t c = 0; c < kHalf; ++c) sums.row(r, p)[c] *= factor;
}

// Half a row of scores, scaled and masked; returns its maximum.
inline float mask_half(float* scores, float scale, const int32_t* keys, int32_t limit) {
  float highest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : highest)
  for (int64_t k = 0; k < kHalf; ++k) {
    scores[k] = keys[k] <= limit ? scores[k] * scale : -std::numeric_limits<float>::infinity();
    highest = scores[k] > highest ? scores[k] : highest;
  }
  return highest;
}

// As online_softmax of attention.h; the weights go to `to` [kTile], what came before fades.
inline void soften_row(const Blocks& scores, int64_t r, const Orders& orders, int32_t limit,
                       float scale, float& maximum, float& sum, BFloat16* to, const Blocks& sums) {
  float highest = maximum;
  for (int64_t half = 0; half < 2; ++half)
    highest =
        std::max(highest, mask_half(scores.row(r, half), scale, orders.key + half * kHalf, limit));
  // NOTE: -inf - -inf is NaN: a row that has seen no key yet keeps exponents of 0
  const float shift = highest == -std::numeric_limits<float>::infinity() ? 0 : highest;
  float total = 0;
  for (int64_t half = 0; half < 2; ++half) {
    float* row = scores.row(r, half);
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < kHalf; ++k) {
      row[k] = exp_fast(row[k] - shift);
      total += row[k];
    }
    round_lanes<BFloat16, kHalf>(row, to + half * kHalf);
  }
  const float fade = exp_fast(maximum - shift);
  sum = sum * fade + total;
  maximum = highest;
  if (fade != 1) scale_row(sums, r, fade);
}

inline void forward_pairs(const Head& at, const BFloat16* qkv, int64_t first,
                          const PairedWork& work, BFloat16* y, float* lse) {
  const int64_t dim = at.heads * at.width, tokens = at.tokens(),
                rows = std::min(kTile, tokens - first);
  const BFloat16* head = qkv + at.head * at.width;
  Pair *across = work.pairs(0), *along = work.pairs(1);
  BFloat16* weights = work.narrow(2);
  const Blocks scores{work.floats(3), 2}, sums{work.floats(4), work.panels};
  float maximum[kTile], total[kTile] = {};
  std::fill_n(maximum, kTile, -std::numeric_limits<float>::infinity());
  std::fill_n(sums.memory, kTile * work.panels * kHalf, 0.0f);
  const TileRows queries(at, head, 3 * dim, first, rows);
  for (int64_t k = 0; k < tokens; k += kTile) {
    const int64_t keys = std::min(kTile, tokens - k);
    const Orders orders(at, k, keys);
    if (orders.hidden_from(at, first, rows)) continue;
    work.pack_across(TileRows(at, head + dim, 3 * dim, k, keys), across);
    work.pack_along(TileRows(at, head + 2 * dim, 3 * dim, k, keys), keys, along);
    multiply_blocks(
        rows, [&](int64_t r) { return queries.pairs(r); }, 1, at.width / 2, across,
        work.depth_panel, true, scores);
    for (int64_t r = 0; r < rows; ++r)
      soften_row(scores, r, orders, at.limit(first + r), static_cast<float>(at.scale), maximum[r],
                 total[r], weights + r * kTile, sums);
    multiply_blocks(
        rows, [&](int64_t r) { return as_units<BFloat16>(weights + r * kTile); }, 1, (keys + 1) / 2,
        along, work.tile_panel, false, sums);
  }
  for (int64_t r = 0; r < rows; ++r) {
    scale_row(sums, r, total[r] == 0 ? 0 : 1 / total[r]);
    lse[at.stat(first + r)] =
        total[r] == 0 ? std::numeric_limits<float>::infinity() : maximum[r] + std::log(total[r]);
  }
  store_blocks(at, sums, first, rows, 1, y + at.head * at.width, dim);
}

// What backward keeps of every tile of queries of one head: panels of Q and dY, sums of dQ.
struct PairedQueries {
  int64_t panels, panel;
  Aligned<float> memory;
  std::vector<bool> is_fresh;

  PairedQueries(const PairedWork& work, int64_t tokens)
      : panels(work.panels),
        panel(work.panels * work.tile_panel),
        memory((2 * panel + panels * kTile * kHalf) * tiles_of(tokens)),
        is_fresh(tiles_of(tokens)) {}
  static int64_t tiles_of(int64_t tokens) { return (tokens + kTile - 1) / kTile; }
  float* of(int64_t tile) const {
    return memory.get() + tile * (2 * panel + panels * kTile * kHalf);
  }
  Pair* query(int64_t tile) const { return reinterpret_cast<Pair*>(of(tile)); }
  Pair* dout(int64_t tile) const { return reinterpret_cast<Pair*>(of(tile) + panel); }
  Blocks sums(int64_t tile) const { return {of(tile) + 2 * panel, panels}; }
};

// A and dS of a tile, rounded, from scores and dA.
inline void score_pairs(const Head& at, const Orders& orders, int64_t first, int64_t rows,
                        const float* lse, const float* delta, const Blocks& scores,
                        const Blocks& gradients, BFloat16* weights, BFloat16* dscores) {
  for (int64_t r = 0; r < rows; ++r) {
    const float shift = lse[at.stat(first + r)], mean = delta[at.stat(first + r)];
    for (int64_t half = 0; half < 2; ++half) {
      float *weight = scores.row(r, half), *gradient = gradients.row(r, half);
      mask_half(weight, static_cast<float>(at.scale), orders.key + half * kHalf,
                at.limit(first + r));
#pragma omp simd
      for (int64_t k = 0; k < kHalf; ++k) {
        weight[k] = exp_fast(weight[k] - shift);
        gradient[k] = weight[k] * (gradient[k] - mean);
      }
      round_lanes<BFloat16, kHalf>(weight, weights + r * kTile + half * kHalf);
      round_lanes<BFloat16, kHalf>(gradient, dscores + r * kTile + half * kHalf);
    }
  }
}

// out[key] (+)= sum over queries of square[query][key] panel[query]: pairs of the square's rows are
// interleaved, and a column of them is read with a step.
inline void multiply_turned(const BFloat16* square, int64_t rows, int64_t keys, Pair* pairs,
                            const Pair* panel, int64_t pitch, bool first, const Blocks& out) {
  for (int64_t half = 0; half < 2; ++half)
    pack_columns<BFloat16, kHalf>([&](int64_t r) { return square + r * kTile + half * kHalf; },
                                  rows, kHalf, pairs + half * kHalf * kHalf);
  multiply_blocks(
      keys, [&](int64_t k) { return pairs + k / kHalf * kHalf * kHalf + k % kHalf; }, kHalf,
      (rows + 1) / 2, panel, pitch, first, out);
}

template <typename Of>
void backward_pairs(const Head& at, const Of& of, const PairedWork& work, PairedQueries& queries) {
  const int64_t dim = at.heads * at.width, tokens = at.tokens(), steps = at.width / 2;
  const BFloat16 *head = of.qkv + at.head * at.width, *dhead = of.dy + at.head * at.width;
  BFloat16* out = of.dqkv + at.head * at.width;
  Pair *keys_across = work.pairs(0), *values_across = work.pairs(1), *keys_along = work.pairs(2),
       *turned = work.pairs(3);
  const Blocks scores{work.floats(4), 2}, gradients{work.floats(5), 2},
      dkey{work.floats(6), work.panels}, dvalue{work.floats(7), work.panels};
  BFloat16 *weights = work.narrow(8), *dscores = weights + PairedWork::kSquare;
  const float scale = static_cast<float>(at.scale);
  const auto queries_at = [&](int64_t q) {
    return TileRows(at, head, 3 * dim, q, std::min(kTile, tokens - q));
  };
  const auto outs_at = [&](int64_t q) {
    return TileRows(at, dhead, dim, q, std::min(kTile, tokens - q));
  };
  for (int64_t q = 0; q < tokens; q += kTile) {
    const int64_t rows = std::min(kTile, tokens - q);
    work.pack_along(queries_at(q), rows, queries.query(q / kTile));
    work.pack_along(outs_at(q), rows, queries.dout(q / kTile));
    queries.is_fresh[q / kTile] = true;
  }
  for (int64_t k = 0; k < tokens; k += kTile) {
    const int64_t keys = std::min(kTile, tokens - k);
    const Orders orders(at, k, keys);
    const TileRows key_rows(at, head + dim, 3 * dim, k, keys);
    work.pack_across(key_rows, keys_across);
    work.pack_along(key_rows, keys, keys_along);
    work.pack_across(TileRows(at, head + 2 * dim, 3 * dim, k, keys), values_across);
    bool first = true;
    for (int64_t q = 0; q < tokens; q += kTile) {
      const int64_t rows = std::min(kTile, tokens - q), tile = q / kTile;
      if (orders.hidden_from(at, q, rows)) continue;
      const TileRows query = queries_at(q), dout = outs_at(q);
      multiply_blocks(
          rows, [&](int64_t r) { return query.pairs(r); }, 1, steps, keys_across, work.depth_panel,
          true, scores);
      multiply_blocks(
          rows, [&](int64_t r) { return dout.pairs(r); }, 1, steps, values_across, work.depth_panel,
          true, gradients);
      score_pairs(at, orders, q, rows, of.lse, of.delta, scores, gradients, weights, dscores);
      multiply_turned(weights, rows, keys, turned, queries.dout(tile), work.tile_panel, first,
                      dvalue);
      multiply_turned(dscores, rows, keys, turned, queries.query(tile), work.tile_panel, first,
                      dkey);
      multiply_blocks(
          rows, [&](int64_t r) { return as_units<BFloat16>(dscores + r * kTile); }, 1,
          (keys + 1) / 2, keys_along, work.tile_panel, queries.is_fresh[tile], queries.sums(tile));
      first = queries.is_fresh[tile] = false;
    }
    if (first) {
      std::fill_n(dkey.memory, kTile * work.panels * kHalf, 0.0f);
      std::fill_n(dvalue.memory, kTile * work.panels * kHalf, 0.0f);
    }
    store_blocks(at, dkey, k, keys, of.upstream * scale, out + dim, 3 * dim);
    store_blocks(at, dvalue, k, keys, of.upstream, out + 2 * dim, 3 * dim);
  }
  for (int64_t q = 0; q < tokens; q += kTile) {
    const Blocks sums = queries.sums(q / kTile);
    if (queries.is_fresh[q / kTile]) std::fill_n(sums.memory, kTile * work.panels * kHalf, 0.0f);
    store_blocks(at, sums, q, std::min(kTile, tokens - q), of.upstream * scale, out, 3 * dim);
  }
}

}  // namespace deepfusion::inline DF_LEVEL
#endif
