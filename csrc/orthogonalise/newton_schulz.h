// Newton-Schulz rounds on one matrix, all of it in the second-level cache:
//
//   X <- M / |M|      G = X X^T      H = b G + c G G      X <- a X + H X
//
// G and H are symmetric: half of each is computed, half mirrored. Multiplied in S = bfloat16 or
// float32; sums in float32.
#pragma once

#include "common/flip.h"
#include "common/row_products.h"

#include <array>
#include <cmath>
#include <utility>

namespace deepfusion::inline DF_LEVEL {

constexpr int64_t up(int64_t count, int64_t unit) {
  return (count + unit - 1) / unit * unit;
}

template <typename In, typename Out>
void copy_rows(const In* in, int64_t rows, int64_t columns, int64_t in_stride, float factor,
               Out* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kSquare) {
      const int64_t width = std::min(kSquare, columns - c);
      float row[kSquare];
      load_lanes<kSquare>(in + r * in_stride + c, width, row);
      for (float& value : row) value *= factor;
      store_lanes<kSquare>(row, width, out + r * out_stride + c);
    }
  }
}

inline float inverse_norm(const float* matrix, int64_t count) {
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < count; ++i) squares += static_cast<double>(matrix[i]) * matrix[i];
  return static_cast<float>(1 / std::max(std::sqrt(squares), 1e-7));
}

// a, b, c of a round.
struct Quintic {
  float a, b, c;
};

// The state of one thread: X [rows, pitch], three squares [side, side], a packed panel.
template <typename S>
class NewtonSchulz {
 public:
  NewtonSchulz(int64_t height, int64_t width)
      : height_(height),
        width_(width),
        rows_(std::min(height, width)),
        columns_(std::max(height, width)),
        pitch_(up(columns_, kWidth)),
        side_(up(rows_, kWidth)),
        x_(rows_ * pitch_),
        squares_(3 * side_ * side_),
        packed_(std::max(pitch_, side_) * kWidth) {
    std::fill_n(x_.get(), rows_ * pitch_, S(0.0f));
    std::fill_n(squares_.get(), 3 * side_ * side_, S(0.0f));
  }

  bool serves(int64_t height, int64_t width) const { return height == height_ && width == width_; }

  // out may be matrix; both [height, width]
  void run(const float* matrix, int64_t rounds, Quintic by, float* out) {
    const bool tall = height_ > width_;
    const float share = inverse_norm(matrix, height_ * width_);
    const auto enter = tall ? flip<float, S> : copy_rows<float, S>;
    enter(matrix, height_, width_, width_, share, x_.get(), pitch_);
    // small products for large ones
    const bool pairs = rounds >= 2 && columns_ >= 2 * rows_;
    if (pairs) first_two_rounds(by);
    for (int64_t n = pairs ? 2 : 0; n < rounds; ++n) round(by);
    const auto leave = tall ? flip<S, float> : copy_rows<S, float>;
    leave(x_.get(), rows_, columns_, pitch_, 1.0f, out, width_);
  }

 private:
  static constexpr int64_t kWidth = kColumns<S>;

  unit_t<S>* panel() const { return reinterpret_cast<unit_t<S>*>(packed_.get()); }
  static const unit_t<S>* units(const S* row) { return reinterpret_cast<const unit_t<S>*>(row); }

  // out = left right^T + sum_i factors[i] addends[i], all symmetric: panels of columns, each from
  // its own rows on. left and right are [rows, depth].
  template <size_t N>
  void symmetric(const S* left, const S* right, int64_t stride, int64_t depth, float factor,
                 const std::array<std::pair<float, const S*>, N>& addends, S* out) {
    for (int64_t first = 0; first < rows_; first += kWidth) {
      const S* sources[kWidth];
      for (int64_t lane = 0; lane < kWidth; ++lane)
        sources[lane] = first + lane < rows_ ? right + (first + lane) * stride : nullptr;
      pack_rows<S>(sources, depth, panel());
      sweep<S>([&](int64_t i) { return units(left + (first + i) * stride); }, rows_ - first, 1,
               panel(), steps_of<S>(depth),
               [&](int64_t i, float* sums) {
                 const int64_t at = (first + i) * side_ + first;
                 for (int64_t lane = 0; lane < kWidth; ++lane) sums[lane] *= factor;
                 for (const auto& [share, addend] : addends) {
                   float old[kWidth];
                   load_lanes<kWidth>(addend + at, kWidth, old);
                   for (int64_t lane = 0; lane < kWidth; ++lane) sums[lane] += share * old[lane];
                 }
                 store_lanes<kWidth>(sums, kWidth, out + at);
               });
      const int64_t below = first + kWidth;
      if (below < rows_)
        flip(out + below * side_ + first, rows_ - below, kWidth, side_, 1.0f,
             out + first * side_ + below, side_);
    }
  }
  // out = factor left right + ...
  template <size_t N>
  void square(const S* left, const S* right, float factor,
              const std::array<std::pair<float, const S*>, N>& addends, S* out) {
    symmetric<N>(left, right, side_, rows_, factor, addends, out);
  }

  // X <- a X + H X
  void apply(float a, const S* H) {
    S* X = x_.get();
    for (int64_t first = 0; first < columns_; first += kWidth) {
      pack_columns<S, kWidth>([&](int64_t k) { return X + k * pitch_ + first; }, rows_, kWidth,
                              panel());
      sweep<S>([&](int64_t i) { return units(H + i * side_); }, rows_, 1, panel(),
               steps_of<S>(rows_),
               [&](int64_t i, float* sums) {
                 S* row = X + i * pitch_ + first;
                 float old[kWidth];
                 load_lanes<kWidth>(row, kWidth, old);
                 for (int64_t lane = 0; lane < kWidth; ++lane) sums[lane] += a * old[lane];
                 store_lanes<kWidth>(sums, kWidth, row);
               });
    }
  }

  // G = X X^T, H = b G + c G G
  void gram(Quintic by, S* G, S* H) {
    symmetric<0>(x_.get(), x_.get(), pitch_, columns_, 1.0f, {}, G);
    square<1>(G, G, by.c, {{{by.b, G}}}, H);
  }

  void round(Quintic by) {
    S *G = squares_.get(), *H = G + side_ * side_;
    gram(by, G, H);
    apply(by.a, H);
  }

  // Polynomials of one G commute and are symmetric, so the second G needs no X:
  //   G' = (a + H) G (a + H)      H' = b G' + c G' G'      (a + H') (a + H) = a a + K
  // Only the first two: later G have more weight to lose in rounding. Here X is rounded once less.
  void first_two_rounds(Quintic by) {
    const auto [a, b, c] = by;
    S *G = squares_.get(), *H = G + side_ * side_, *K = H + side_ * side_;
    gram(by, G, H);
    square<1>(H, G, 1.0f, {{{a, G}}}, K);
    square<1>(K, H, 1.0f, {{{a, K}}}, G);
    square<1>(G, G, c, {{{b, G}}}, K);
    square<2>(K, H, 1.0f, {{{a, K}, {a, H}}}, G);
    apply(a * a, G);
  }

  int64_t height_, width_, rows_, columns_, pitch_, side_;
  Aligned<S> x_, squares_;
  // units of four bytes, whichever they are
  Aligned<float> packed_;
};

}  // namespace deepfusion::inline DF_LEVEL
