// The host's side of the attention kernels: what they are called with, the types and head sizes
// that they are compiled for, launches with shared memory.
#pragma once

#include "common/float_kind.h"
#include "common/torch_cuda.h"
#include "view_aligned_attention/backward.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

namespace deepfusion {

constexpr const char* kAttention = "multi_stage_attention";

inline void check_pointer(const void* pointer, const char* argument) {
  STD_TORCH_CHECK(is_aligned16(pointer), kAttention, ": ", argument,
                  " must begin at a multiple of 16 bytes");
}

inline Head head_of(int64_t stages, int64_t batch, int64_t patches, int64_t heads, int64_t width,
                    const std::optional<Tensor>& valid, bool causal) {
  STD_TORCH_CHECK(width == 16 || width == 32 || width == 64 || width == 128, kAttention,
                  ": D / num_heads must be 16, 32, 64 or 128 on CUDA, got ", width);
  STD_TORCH_CHECK(batch * heads * stages * patches < (int64_t{1} << 31), kAttention,
                  ": features must have fewer than 2^31 rows times heads on CUDA");
  Head head = {};
  head.stages = static_cast<int>(stages);
  head.batch = static_cast<int>(batch);
  head.patches = static_cast<int>(patches);
  head.heads = static_cast<int>(heads);
  head.width = static_cast<int>(width);
  head.valid = valid ? valid->const_data_ptr<bool>() : nullptr;
  head.causal = causal;
  return head;
}

// Whichever kernel follows: its inputs, checked.
inline BackwardCall backward_call(const Tensor& qkv, const Tensor& lse, const Tensor& dy,
                                  const Tensor& delta, const std::optional<Tensor>& valid,
                                  int64_t heads, bool causal, double scale, const Tensor& upstream,
                                  Tensor& dqkv) {
  BackwardCall call = {};
  call.head =
      head_of(qkv.size(0), qkv.size(1), qkv.size(2), heads, qkv.size(3) / 3 / heads, valid, causal);
  call.qkv = qkv.const_data_ptr();
  call.dy = dy.const_data_ptr();
  call.lse = lse.const_data_ptr<float>();
  call.delta = delta.const_data_ptr<float>();
  call.upstream = upstream.const_data_ptr<float>();
  call.dqkv = dqkv.mutable_data_ptr();
  call.scale = static_cast<float>(scale) * kLog2E;
  check_pointer(call.qkv, "qkv");
  check_pointer(call.dy, "dy");
  check_pointer(call.dqkv, "dqkv");
  return call;
}

template <typename T>
struct Element {
  using type = T;
};

// body(Element<T>(), head size) with both known when compiling.
template <typename Body>
void with_kernel(Kind kind, int width, const Body& body) {
  const auto with_width = [&](auto element) {
    if (width == 16) return body(element, std::integral_constant<int, 16>());
    if (width == 32) return body(element, std::integral_constant<int, 32>());
    if (width == 64) return body(element, std::integral_constant<int, 64>());
    return body(element, std::integral_constant<int, 128>());
  };
  switch (kind) {
    case Kind::kFloat:
      return with_width(Element<float>());
    case Kind::kBFloat16:
      return with_width(Element<__nv_bfloat16>());
    case Kind::kHalf:
      return with_width(Element<__half>());
  }
}

template <typename Call>
void launch(void (*kernel)(Call), int64_t blocks, int threads, int bytes, const Call& call,
            cudaStream_t stream) {
  // of the largest target; sm_120 has the least, 99 KiB
  STD_TORCH_CHECK(bytes <= 99 << 10, kAttention, ": kernel wants ", bytes,
                  " bytes of shared memory");
  const auto error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  STD_TORCH_CHECK(error == 0, kAttention, ": the device has no ", bytes,
                  " bytes of shared memory for a block");
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(call);
  check_launch(kAttention);
}

}  // namespace deepfusion
