// Transposes in squares that stay in registers.
#pragma once

#include "common/lanes.h"
#include "common/pack.h"

namespace deepfusion::inline DF_LEVEL {

constexpr int64_t kSquare = 16;

// out[c][r] = factor * in[r][c]
template <typename In, typename Out>
void flip(const In* in, int64_t rows, int64_t columns, int64_t in_stride, wide_t<In> factor,
          Out* out, int64_t out_stride) {
  using W = wide_t<In>;
  typedef W Lanes __attribute__((vector_size(sizeof(W) * kSquare)));
  for (int64_t r = 0; r < rows; r += kSquare) {
    const int64_t height = std::min(kSquare, rows - r);
    for (int64_t c = 0; c < columns; c += kSquare) {
      const int64_t width = std::min(kSquare, columns - c);
      Lanes square[kSquare] = {};
      for (int64_t i = 0; i < height; ++i) {
        W row[kSquare];
        load_lanes<kSquare>(in + (r + i) * in_stride + c, width, row);
        std::memcpy(&square[i], row, sizeof(row));
        square[i] *= factor;
      }
      transpose<Lanes, kSquare>(square);
      for (int64_t i = 0; i < width; ++i) {
        W row[kSquare];
        std::memcpy(row, &square[i], sizeof(row));
        store_lanes<kSquare>(row, height, out + (c + i) * out_stride + r);
      }
    }
  }
}

}  // namespace deepfusion::inline DF_LEVEL
