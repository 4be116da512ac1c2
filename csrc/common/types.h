// The float types of a tensor as C++ types, and their widening.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace deepfusion {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// What arithmetic happens in: float64 for float64, float32 for the rest.
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <typename T>
using wide_t = typename Wide<T>::type;

}  // namespace deepfusion

// DF_DISPATCH_FLOAT(dtype, "op", [&] { ... scalar_t ... });
#define DF_DISPATCH_FLOAT(dtype, op, ...)                                                         \
  THO_DISPATCH_V2(dtype, op, AT_WRAP(__VA_ARGS__), torch::headeronly::ScalarType::Float,          \
                  torch::headeronly::ScalarType::Double, torch::headeronly::ScalarType::BFloat16, \
                  torch::headeronly::ScalarType::Half)
