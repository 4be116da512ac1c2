// What stands between the library products of the fused linear loss: a block a row.
//
//   G = mean of the patch's valid tokens (perhaps layer-normed)     R = prediction + u - G
//   sse = |R|^2                     the prediction becomes E = 2 scale R; rows of scale 0 become 0
#include "common/float_kind.h"
#include "common/patches.cuh"
#include "common/torch_cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

namespace {

using namespace deepfusion;

constexpr const char* kOp = "fused_linear_mse";
constexpr int kThreads = 256;  // not measured
constexpr float kNormEps = 1e-6f;

struct ErrorCall {
  float* predictions;  // [C, M]
  const void *bias, *target;
  const int32_t* offsets;
  const bool* mask;
  const float* scale;
  float* sse;
  int first, patches;
  int64_t length, columns, stride_sample, stride_token;
  Kind kind;
  bool is_normed;
};

__global__ void __launch_bounds__(kThreads, 4) error_kernel(ErrorCall call) {
  __shared__ float shared[kThreads / kWarp];
  const int row = call.first + static_cast<int>(blockIdx.x);
  const int64_t M = call.columns;
  float* errors = call.predictions + static_cast<int64_t>(blockIdx.x) * M;
  const float scale = call.scale[row];
  if (scale == 0.0f) {
    for (int64_t c = threadIdx.x; c < M; c += kThreads) errors[c] = 0.0f;
    if (threadIdx.x == 0) call.sse[row] = 0.0f;
    return;
  }
  const int b = row / call.patches;
  const Patch patch =
      patch_at(call.offsets, call.mask, call.patches, call.length, b, row % call.patches);
  const int count = patch.count();
  const char* sample =
      static_cast<const char*>(call.target) + b * call.stride_sample * bytes_of(call.kind);
  const auto goal = [&](int64_t c) {
    return patch_mean(sample, call.stride_token, patch, count, c, call.kind);
  };
  float mean = 0.0f, factor = 1.0f;
  if (call.is_normed) {
    // the tokens are read again rather than kept: a row may be longer than the registers
    float sum = 0.0f;
    for (int64_t c = threadIdx.x; c < M; c += kThreads) sum += goal(c);
    mean = block_sum(sum, shared) / static_cast<float>(M);
    float square = 0.0f;
    for (int64_t c = threadIdx.x; c < M; c += kThreads) {
      const float centred = goal(c) - mean;
      square = fmaf(centred, centred, square);
    }
    factor = rsqrtf(block_sum(square, shared) / static_cast<float>(M) + kNormEps);
  }
  float sse = 0.0f;
  for (int64_t c = threadIdx.x; c < M; c += kThreads) {
    const float bias = call.bias ? load1(call.bias, c, call.kind) : 0.0f;
    const float error = errors[c] + bias - (goal(c) - mean) * factor;
    sse = fmaf(error, error, sse);
    errors[c] = 2.0f * scale * error;
  }
  sse = block_sum(sse, shared);
  if (threadIdx.x == 0) call.sse[row] = sse;
}

// predictions [C, M] of rows first .. first + C become E; their sse [N] is written.
void linear_mse_epilogue_cuda(Tensor predictions, std::optional<Tensor> bias, Tensor target,
                              Tensor offsets, std::optional<Tensor> mask, Tensor scale, Tensor sse,
                              int64_t first, bool target_norm) {
  if (predictions.size(0) == 0) return;
  torch::stable::accelerator::DeviceGuard guard(predictions.get_device_index());
  check_dense_rows(target, kOp, "target");
  STD_TORCH_CHECK(sse.size(0) < int64_t{1} << 31, kOp, ": features must have fewer than 2^31 rows");
  ErrorCall call = {};
  call.predictions = predictions.mutable_data_ptr<float>();
  call.bias = bias ? bias->const_data_ptr() : nullptr;
  call.target = target.const_data_ptr();
  call.offsets = offsets.const_data_ptr<int32_t>();
  call.mask = mask ? mask->const_data_ptr<bool>() : nullptr;
  call.scale = scale.const_data_ptr<float>();
  call.sse = sse.mutable_data_ptr<float>();
  call.first = static_cast<int>(first);
  call.patches = static_cast<int>(offsets.size(1) - 1);
  call.length = target.size(1);
  call.columns = predictions.size(1);
  call.stride_sample = target.stride(0);
  call.stride_token = target.stride(1);
  call.kind = kind_of(target, kOp, "target");
  call.is_normed = target_norm;
  error_kernel<<<static_cast<unsigned>(predictions.size(0)), kThreads, 0,
                 current_stream(predictions.get_device_index())>>>(call);
  check_launch(kOp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepfusion_native, CUDA, m) {
  m.impl("linear_mse_epilogue", TORCH_BOX(&linear_mse_epilogue_cuda));
}
