// Rows of logits [A, B, V] of any float type on the CPU, as blocks of the type the arithmetic
// happens in.
#pragma once

#include "common/cpu.h"
#include "common/large_pages.h"

#include <algorithm>

namespace deepfusion::inline DF_LEVEL {

template <typename W, typename T>
inline const W* widen_block(const T* from, int64_t count, W* to) {
#pragma omp simd
  for (int64_t v = 0; v < count; ++v) to[v] = static_cast<W>(to_wide(from[v]));
  return to;
}

template <typename W, typename T>
inline void narrow_block(const W* from, int64_t count, T* to) {
#pragma omp simd
  for (int64_t v = 0; v < count; ++v) to[v] = from_wide<T>(static_cast<wide_t<T>>(from[v]));
}

inline int64_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// One row: hands out blocks of columns as W, where they lie if they are W already, else widened
// into `buffer`.
template <typename W>
struct LogitRow {
  const char* data;
  ScalarType dtype;

  const W* operator()(int64_t begin, int64_t count, W* buffer) const {
    const char* from = data + begin * bytes_of(dtype);
    switch (dtype) {
      case ScalarType::BFloat16:
        return widen_block(reinterpret_cast<const BFloat16*>(from), count, buffer);
      case ScalarType::Half:
        return widen_block(reinterpret_cast<const Half*>(from), count, buffer);
      case ScalarType::Double:
        if constexpr (sizeof(W) == sizeof(double)) return reinterpret_cast<const W*>(from);
        break;
      default:
        if constexpr (sizeof(W) == sizeof(float)) return reinterpret_cast<const W*>(from);
        return widen_block(reinterpret_cast<const float*>(from), count, buffer);
    }
    return nullptr;
  }
};

// One row to be written: arithmetic goes to place(), store() brings it into the tensor.
template <typename W>
struct GradientRow {
  char* data = nullptr;  // null: not wanted
  ScalarType dtype = ScalarType::Float;

  bool in_place() const { return bytes_of(dtype) == static_cast<int64_t>(sizeof(W)); }

  W* place(int64_t begin, W* buffer) const {
    if (!data) return nullptr;
    return in_place() ? reinterpret_cast<W*>(data) + begin : buffer;
  }

  void store(int64_t begin, int64_t count, const W* from) const {
    if (!data || in_place()) return;
    char* to = data + begin * bytes_of(dtype);
    if (dtype == ScalarType::BFloat16) {
      narrow_block(from, count, reinterpret_cast<BFloat16*>(to));
    } else if (dtype == ScalarType::Half) {
      narrow_block(from, count, reinterpret_cast<Half*>(to));
    } else {
      narrow_block(from, count, reinterpret_cast<float*>(to));
    }
  }
};

// [A, B, V] by two row strides; row t = a B + b.
struct LogitRows {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t B = 1, V = 0, stride_a = 0, stride_b = 0;

  explicit LogitRows() = default;
  LogitRows(const Tensor& logits, bool written)
      : data(static_cast<char*>(written ? logits.mutable_data_ptr()
                                        : const_cast<void*>(logits.const_data_ptr()))),
        dtype(logits.scalar_type()),
        B(logits.size(1)),
        V(logits.size(2)),
        stride_a(logits.stride(0)),
        stride_b(logits.stride(1)) {}

  char* row(int64_t t) const {
    return data ? data + ((t / B) * stride_a + (t % B) * stride_b) * bytes_of(dtype) : nullptr;
  }
};

}  // namespace deepfusion::inline DF_LEVEL
