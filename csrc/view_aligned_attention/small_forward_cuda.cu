// Launches of small_attention.cuh: up to 128 tokens of two-byte floats, 64 of float32.
#include "view_aligned_attention/launch.cuh"
#include "view_aligned_attention/small_attention.cuh"

namespace {

using namespace deepfusion;

template <typename T, int kWidth, int kStrips>
void start(const SmallForwardCall& call, cudaStream_t stream) {
  using At = SmallForwardMemory<T, kWidth, kStrips>;
  launch(small_forward_kernel<T, kWidth, kStrips>,
         static_cast<int64_t>(call.head.batch) * call.head.heads, At::kThreads, At::kBytes, call,
         stream);
}

// x [J, B, Q, D] with any strides but the last; qkv, y and lse [B, H, P] are written.
void small_attention_forward_cuda(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                  std::optional<Tensor> valid, int64_t heads, bool causal,
                                  double scale, Tensor qkv, Tensor y, Tensor lse) {
  const Kind kind = kind_of(x, kAttention, "features");
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_dense_rows(x, kAttention, "features");
  SmallForwardCall call = {};
  call.head = head_of(x.size(0), x.size(1), x.size(2), heads, x.size(3) / heads, valid, causal);
  call.x = x.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.bias = bias ? bias->const_data_ptr() : nullptr;
  call.qkv = qkv.mutable_data_ptr();
  call.y = y.mutable_data_ptr();
  call.lse = lse.mutable_data_ptr<float>();
  call.stride_stage = x.stride(0);
  call.stride_sample = x.stride(1);
  call.stride_patch = x.stride(2);
  call.scale = static_cast<float>(scale) * kLog2E;
  for (const auto& [pointer, argument] :
       {std::pair(call.x, "features"), std::pair(call.weight, "qkv_weight"),
        std::pair(static_cast<const void*>(call.qkv), "qkv"),
        std::pair(static_cast<const void*>(call.y), "y")})
    check_pointer(pointer, argument);
  for (int64_t axis = 0; axis < 3; ++axis)
    STD_TORCH_CHECK(x.stride(axis) * bytes_of(kind) % 16 == 0, kAttention,
                    ": rows of features must begin at multiples of 16 bytes");
  const int64_t tokens = x.size(0) * x.size(2);
  const bool is_wide = tokens > 64;
  STD_TORCH_CHECK(call.head.width <= 64 && tokens <= (kind == Kind::kFloat ? 64 : 128), kAttention,
                  ": too many tokens or channels for a head to stay on chip");
  if (tokens * x.size(1) * heads == 0) return;
  const cudaStream_t stream = current_stream(x.get_device_index());
  with_kernel(kind, call.head.width, [&](auto element, auto width) {
    using T = typename decltype(element)::type;
    constexpr int kWidth = decltype(width)::value;
    if constexpr (kWidth <= 64) {
      if constexpr (sizeof(T) == 2) {
        if (is_wide) return start<T, kWidth, 8>(call, stream);
      }
      start<T, kWidth, 4>(call, stream);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepfusion_native, CUDA, m) {
  m.impl("small_attention_forward", TORCH_BOX(&small_attention_forward_cuda));
}
