// The kind of a tensor's floats, for CUDA kernels that take it at run time.
#pragma once

#include "common/checks.h"
#include "common/cuda.cuh"

#include <torch/headeronly/core/ScalarType.h>

namespace deepfusion {

inline Kind kind_of(const Tensor& tensor, const char* op, const char* argument) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  const bool is_float = dtype == ScalarType::Float, is_bf16 = dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(is_float || is_bf16 || dtype == ScalarType::Half, op, ": ", argument,
                  " must be float32, bfloat16 or float16 on CUDA");
  return is_float ? Kind::kFloat : is_bf16 ? Kind::kBFloat16 : Kind::kHalf;
}

}  // namespace deepfusion
