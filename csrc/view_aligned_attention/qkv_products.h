// The products on either side of the attention, where rows are multiplied as they lie
// (common/row_products.h).
//
//   Q, K, V = X Wqkv^T + b      dX = dQKV Wqkv      dWqkv = dQKV^T X      db = sum_rows dQKV
#pragma once

#include "common/row_products.h"

#include <optional>
#include <vector>

#if defined(DF_LEVEL_avx512)
namespace deepfusion::inline DF_LEVEL {

// Rows of X [J, B, Q, D] in the order of J, B, Q; only the last axis need be dense.
template <typename T>
class FeatureRows {
 public:
  explicit FeatureRows(const Tensor& x)
      : base_(x.const_data_ptr<T>()),
        batch_(x.size(1)),
        patches_(x.size(2)),
        stage_(x.stride(0)),
        sample_(x.stride(1)),
        row_(x.stride(2)),
        is_even_((batch_ == 1 || sample_ == patches_ * row_) &&
                 (x.size(0) == 1 || stage_ == batch_ * patches_ * row_)) {}
  const T* at(int64_t r) const {
    if (is_even_) return base_ + r * row_;
    const int64_t sample = r / patches_;
    return base_ + sample / batch_ * stage_ + sample % batch_ * sample_ + r % patches_ * row_;
  }

 private:
  const T* base_;
  int64_t batch_, patches_, stage_, sample_, row_;
  bool is_even_;
};

template <typename T>
void project_qkv(const Tensor& x, const Tensor& weight, const T* bias, T* qkv) {
  constexpr int64_t WIDTH = kColumns<T>;
  const int64_t D = x.size(3);
  const Products of{1, x.numel() / D, 3 * D, D};
  const FeatureRows<T> rows(x);
  multiply<T>(
      of, [&](int64_t, int64_t r) { return as_units<T>(rows.at(r)); }, 1,
      ByRows<T>{weight.const_data_ptr<T>(), &of},
      [&](int64_t, int64_t r, int64_t column, int64_t count, const float* sums) {
        T* to = qkv + r * of.columns + column;
        if (!bias) return round_lanes<T, WIDTH>(sums, count, to);
        alignas(64) float lanes[WIDTH];
        load_lanes<WIDTH>(bias + column, count, lanes);
        for (int64_t i = 0; i < WIDTH; ++i) lanes[i] += sums[i];
        round_lanes<T, WIDTH>(lanes, count, to);
      });
}

template <typename T>
void find_dx(const T* dqkv, const Tensor& weight, Tensor& dx) {
  const int64_t D = dx.size(3);
  const T* w = weight.const_data_ptr<T>();
  T* out = dx.mutable_data_ptr<T>();
  multiply<T>(
      {1, dx.numel() / D, D, 3 * D},
      [&](int64_t, int64_t r) { return as_units<T>(dqkv + r * 3 * D); }, 1,
      by_columns<T>([&](int64_t, int64_t k) { return w + k * D; }),
      [&](int64_t, int64_t r, int64_t column, int64_t count, const float* sums) {
        round_lanes<T, kColumns<T>>(sums, count, out + r * D + column);
      });
}

// One matrix each for Q, K and V.
template <typename T>
void find_dqkv_weight(const T* dqkv, const Tensor& x, T* dweight) {
  const int64_t D = x.size(3);
  const Products of{3, D, D, x.numel() / D};
  const FeatureRows<T> rows(x);
  const Turned<T> left(of, [&](int64_t j, int64_t r) { return dqkv + r * 3 * D + j * D; });
  multiply<T>(
      of, [&](int64_t j, int64_t d) { return left.at(j, d); }, left.kStrip,
      by_columns<T>([&](int64_t, int64_t r) { return rows.at(r); }),
      [&](int64_t j, int64_t d, int64_t column, int64_t count, const float* sums) {
        round_lanes<T, kColumns<T>>(sums, count, dweight + (j * D + d) * D + column);
      });
}

// out [groups, width] <- sums of the rows row_of(group, n), n < count, in that order.
template <typename T, typename RowOf>
void sum_rows(const T* rows, int64_t width, int64_t groups, int64_t count, const RowOf& row_of,
              T* out) {
  for_rows(groups, 1, [&](int64_t group) {
    std::vector<float> sums(width);
    for (int64_t n = 0; n < count; ++n) {
      const T* row = rows + row_of(group, n) * width;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) sums[c] += to_wide(row[c]);
    }
    for (int64_t c = 0; c < width; ++c) out[group * width + c] = from_wide<T>(sums[c]);
  });
}

// out [width] <- sums of `count` rows, columns shared out.
template <typename T>
void sum_columns(const T* rows, int64_t width, int64_t count, T* out) {
  constexpr int64_t kBlock = 64;
  for_rows((width + kBlock - 1) / kBlock, 1, [&](int64_t task) {
    const int64_t first = task * kBlock, some = std::min(kBlock, width - first);
    float sums[kBlock] = {};
    for (int64_t n = 0; n < count; ++n) {
      const T* row = rows + n * width + first;
#pragma omp simd
      for (int64_t c = 0; c < some; ++c) sums[c] += to_wide(row[c]);
    }
    for (int64_t c = 0; c < some; ++c) out[first + c] = from_wide<T>(sums[c]);
  });
}

template <typename Body>
void for_type(const Tensor& like, const Body& body) {
  if (like.scalar_type() == ScalarType::Float)
    body(float());
  else
    body(BFloat16());
}

}  // namespace deepfusion::inline DF_LEVEL
#endif
