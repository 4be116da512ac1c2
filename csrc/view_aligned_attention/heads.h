// One head of one sample: the way from token to row, tiles of 64 tokens in and out, and which keys
// are seen.
#pragma once

#include "common/flip.h"
#include "common/tile_gemm.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace deepfusion::inline DF_LEVEL {

constexpr int64_t kTile =
    64;  // S of two tiles is 16 KiB: half a first-level cache; unmeasured beside 32 and 128
constexpr int64_t kRowsAhead = 8;
constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

// One head of one sample, and the way from token to row.
struct Head {
  int64_t stages, batch, patches, heads, width, sample, head;
  const bool* valid;
  bool causal;
  double scale;

  int64_t tokens() const { return stages * patches; }
  int64_t row(int64_t p) const { return ((p / patches) * batch + sample) * patches + p % patches; }
  int64_t stat(int64_t p) const { return (sample * heads + head) * tokens() + p; }
  // a key is seen by queries whose limit is at least its order
  int32_t order(int64_t p) const {
    const int64_t i = p % patches;
    return valid && !valid[sample * patches + i] ? kNever : static_cast<int32_t>(i);
  }
  int32_t limit(int64_t p) const { return causal ? static_cast<int32_t>(p % patches) : kNever - 1; }
};

// Rows of successive tokens without a division for each.
struct Walk {
  int64_t row, left, patches, jump;

  Walk(const Head& at, int64_t first)
      : row(at.row(first)),
        left(at.patches - first % at.patches),
        patches(at.patches),
        jump((at.batch - 1) * at.patches) {}
  void next() {
    ++row;
    if (--left > 0) return;
    row += jump;
    left = patches;
  }
};

// out [kTile, wide] <- factor * tokens first .. first + count of one head; the padding is 0.
template <typename T, typename W>
inline void load_tile(const Head& at, const T* base, int64_t row_stride, int64_t first,
                      int64_t count, W factor, W* out) {
  const int64_t wide = padded(at.width);
  Walk walk(at, first);
  for (int64_t r = 0; r < count; ++r, walk.next()) {
    const T* source = base + walk.row * row_stride;
    // a row is a line or two, far from the next: no pattern for the processor's own prefetch
    for (int64_t c = 0; c < at.width; c += 64 / int64_t{sizeof(T)})
      __builtin_prefetch(source + kRowsAhead * row_stride + c);
    W* row = out + r * wide;
    for (int64_t c = 0; c < at.width; ++c) row[c] = factor * to_wide(source[c]);
    std::fill(row + at.width, row + wide, W(0));
  }
  std::fill(out + count * wide, out + kTile * wide, W(0));
}

// out [width, kTile] <- the tile's transpose.
template <typename W>
inline void transpose_tile(const W* tile, int64_t width, W* out) {
  flip(tile, kTile, width, padded(width), W(1), out, kTile);
}

template <typename T, typename W>
inline void store_tile(const Head& at, const W* tile, int64_t first, int64_t count, W factor,
                       T* base, int64_t row_stride) {
  const int64_t wide = padded(at.width);
  Walk walk(at, first);
  for (int64_t r = 0; r < count; ++r, walk.next()) {
    T* out = base + walk.row * row_stride;
    for (int64_t c = 0; c < at.width; ++c) out[c] = from_wide<T>(tile[r * wide + c] * factor);
  }
}

struct Orders {
  int32_t key[kTile];
  int32_t least;

  Orders(const Head& at, int64_t first, int64_t count) : least(kNever) {
    for (int64_t k = 0; k < kTile; ++k) {
      key[k] = k < count ? at.order(first + k) : kNever;
      least = std::min(least, key[k]);
    }
  }
  // no query of the tile sees any key of it
  bool hidden_from(const Head& at, int64_t first, int64_t count) const {
    int32_t limit = -1;
    for (int64_t r = 0; r < count; ++r) limit = std::max(limit, at.limit(first + r));
    return least > limit;
  }
};

// Buffers of one thread: tiles [kTile, padded width], their transposes, scores.
template <typename W>
struct Workspace {
  int64_t tile;
  std::vector<W> memory;

  Workspace(int64_t width, int64_t tiles)
      : tile(kTile * padded(width)), memory(tile * (tiles + 2) + 2 * kTile * kTile) {}
  W* operator[](int64_t index) { return memory.data() + index * tile; }
  W* scores(int64_t index) { return memory.data() + memory.size() - (index + 1) * kTile * kTile; }
};

}  // namespace deepfusion::inline DF_LEVEL
