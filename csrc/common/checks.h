// One wording for shape, dtype and device errors: `op: argument must be what, got what`.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <string>

namespace deepfusion {

using torch::stable::Tensor;

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    text += (axis ? ", " : "") + std::to_string(tensor.size(axis));
  }
  return text + "]";
}

// `letters` is the shape as the documents write it, e.g. "[T, V]"; a wanted extent below 0 is free.
inline void check_shape(const Tensor& tensor, const char* op, const char* argument,
                        const char* letters, std::initializer_list<int64_t> wanted) {
  bool same = tensor.dim() == static_cast<int64_t>(wanted.size());
  int64_t axis = 0;
  for (int64_t extent : wanted) {
    if (!same) break;
    same = extent < 0 || tensor.size(axis) == extent;
    ++axis;
  }
  STD_TORCH_CHECK(same, op, ": ", argument, " must be ", letters, ", got ", shape_text(tensor));
}

inline void check_dense_rows(const Tensor& tensor, const char* op, const char* argument) {
  const int64_t last = tensor.dim() - 1;
  const bool dense = last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1;
  STD_TORCH_CHECK(dense, op, ": ", argument, " must have last stride 1, got ",
                  last < 0 ? 0 : tensor.stride(last));
}

}  // namespace deepfusion
