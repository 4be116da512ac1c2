// Around the library products of the patch projection: tokens to the rows that are multiplied, and
// back. A block a patch; a token is written by one block alone.
//
//   conv  rows = vec(m F)[patch], missing tail tokens 0
//   pool  rows = mean of the patch's valid tokens; back, m / n of the row to each of its tokens
#include "common/float_kind.h"
#include "common/patches.cuh"
#include "common/torch_cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

namespace {

using namespace deepfusion;

constexpr const char* kOp = "view_aligned_attention";
constexpr int kThreads = 256;  // not measured

struct PatchCall {
  const void* tokens;  // [B, L, H], columns dense
  const void* rows;    // [C, width]
  const int32_t* offsets;
  const bool* mask;
  int first, patches;
  int64_t length, columns, width, stride_sample, stride_token;
  Kind kind;

  __device__ int64_t row() const { return blockIdx.x; }
  __device__ int patch_number() const { return first + static_cast<int>(blockIdx.x); }
  __device__ int sample() const { return patch_number() / patches; }
  __device__ int index() const { return patch_number() % patches; }
  __device__ Patch patch() const {
    return patch_at(offsets, mask, patches, length, sample(), index());
  }
};

// A word is 16 bytes or one element; lengths and strides of the call count words.
template <typename Word>
__global__ void __launch_bounds__(kThreads, 4) pack_kernel(PatchCall call) {
  const Patch patch = call.patch();
  const int width = static_cast<int>(call.width), columns = static_cast<int>(call.columns);
  const Word* sample = static_cast<const Word*>(call.tokens) + call.sample() * call.stride_sample;
  Word* to = static_cast<Word*>(const_cast<void*>(call.rows)) + call.row() * call.width;
  for (int word = threadIdx.x; word < width; word += kThreads) {
    const int token = patch.begin + word / columns;
    const bool is_kept = token < patch.end && patch.holds(token);
    to[word] = is_kept ? __ldg(sample + token * call.stride_token + word % columns) : Word{};
  }
}

template <typename Word>
__global__ void __launch_bounds__(kThreads, 4) unpack_kernel(PatchCall call) {
  const Patch patch = call.patch();
  const int columns = static_cast<int>(call.columns), all = (patch.end - patch.begin) * columns;
  const Word* from = static_cast<const Word*>(call.rows) + call.row() * call.width;
  Word* sample =
      static_cast<Word*>(const_cast<void*>(call.tokens)) + call.sample() * call.stride_sample;
  for (int word = threadIdx.x; word < all; word += kThreads) {
    const int token = patch.begin + word / columns;
    sample[token * call.stride_token + word % columns] =
        patch.holds(token) ? __ldg(from + word) : Word{};
  }
}

__global__ void __launch_bounds__(kThreads, 4) pool_kernel(PatchCall call) {
  const Patch patch = call.patch();
  const int count = patch.count();
  const char* sample = static_cast<const char*>(call.tokens) +
                       call.sample() * call.stride_sample * bytes_of(call.kind);
  for (int64_t c = threadIdx.x; c < call.columns; c += kThreads)
    store1(const_cast<void*>(call.rows), call.row() * call.columns + c, call.kind,
           patch_mean(sample, call.stride_token, patch, count, c, call.kind));
}

// The first and the last patch of a sample also clear the tokens that lie in none.
__global__ void __launch_bounds__(kThreads, 4) unpool_kernel(PatchCall call) {
  const Patch patch = call.patch();
  const float share = 1.0f / static_cast<float>(max(patch.count(), 1));
  const int index = call.index();
  const int low = index == 0 ? 0 : patch.begin;
  const int high = index == call.patches - 1 ? static_cast<int>(call.length) : patch.end;
  void* tokens = const_cast<void*>(call.tokens);
  for (int64_t c = threadIdx.x; c < call.columns; c += kThreads) {
    const float value = load1(call.rows, call.row() * call.columns + c, call.kind) * share;
    for (int token = low; token < high; ++token) {
      const bool is_kept = token >= patch.begin && token < patch.end && patch.holds(token);
      store1(tokens, call.sample() * call.stride_sample + token * call.stride_token + c, call.kind,
             is_kept ? value : 0.0f);
    }
  }
}

PatchCall call_of(const Tensor& tokens, const Tensor& rows, const Tensor& offsets,
                  const std::optional<Tensor>& mask, int64_t first) {
  check_dense_rows(tokens, kOp, "student_stages");
  STD_TORCH_CHECK(tokens.size(0) * (offsets.size(1) - 1) < int64_t{1} << 31, kOp,
                  ": student_stages must have fewer than 2^31 patches");
  PatchCall call = {};
  call.tokens = tokens.const_data_ptr();
  call.rows = rows.const_data_ptr();
  call.offsets = offsets.const_data_ptr<int32_t>();
  call.mask = mask ? mask->const_data_ptr<bool>() : nullptr;
  call.first = static_cast<int>(first);
  call.patches = static_cast<int>(offsets.size(1) - 1);
  call.length = tokens.size(1);
  call.columns = tokens.size(2);
  call.width = rows.size(1);
  call.stride_sample = tokens.stride(0);
  call.stride_token = tokens.stride(1);
  call.kind = kind_of(tokens, kOp, "student_stages");
  return call;
}

// body(word, the call in words): 16 bytes a word where every row begins and ends at such a
// multiple.
template <typename Body>
void with_words(PatchCall call, const Body& body) {
  const int64_t bytes = bytes_of(call.kind), held = 16 / bytes;
  const bool is_whole = is_aligned16(call.tokens) && is_aligned16(call.rows) &&
                        call.columns % held == 0 && call.stride_token % held == 0 &&
                        call.stride_sample % held == 0;
  if (!is_whole) return bytes == 4 ? body(uint32_t(), call) : body(uint16_t(), call);
  for (int64_t* length : {&call.columns, &call.width, &call.stride_sample, &call.stride_token})
    *length /= held;
  body(uint4(), call);
}

// rows [C, p H] <- patches first .. first + C of tokens [B, L, H].
void pack_patches_cuda(Tensor tokens, Tensor offsets, std::optional<Tensor> mask, int64_t first,
                       Tensor rows) {
  if (rows.numel() == 0) return;
  torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const PatchCall call = call_of(tokens, rows, offsets, mask, first);
  const cudaStream_t stream = current_stream(tokens.get_device_index());
  with_words(call, [&](auto word, const PatchCall& in_words) {
    pack_kernel<decltype(word)>
        <<<static_cast<unsigned>(rows.size(0)), kThreads, 0, stream>>>(in_words);
  });
  check_launch(kOp);
}

// The gradient of pack_patches: rows [C, p H] -> tokens [B, L, H], 0 where masked.
void unpack_patches_cuda(Tensor rows, Tensor offsets, std::optional<Tensor> mask, int64_t first,
                         Tensor tokens) {
  if (rows.numel() == 0) return;
  torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const PatchCall call = call_of(tokens, rows, offsets, mask, first);
  const cudaStream_t stream = current_stream(tokens.get_device_index());
  with_words(call, [&](auto word, const PatchCall& in_words) {
    unpack_kernel<decltype(word)>
        <<<static_cast<unsigned>(rows.size(0)), kThreads, 0, stream>>>(in_words);
  });
  check_launch(kOp);
}

// rows [B Q, H] <- means of the patches of tokens [B, L, H].
void pool_patches_cuda(Tensor tokens, Tensor offsets, std::optional<Tensor> mask, Tensor rows) {
  if (rows.numel() == 0) return;
  torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const PatchCall call = call_of(tokens, rows, offsets, mask, 0);
  pool_kernel<<<static_cast<unsigned>(rows.size(0)), kThreads, 0,
                current_stream(tokens.get_device_index())>>>(call);
  check_launch(kOp);
}

// The gradient of pool_patches: rows [B Q, H] -> tokens [B, L, H], 0 where masked or in no patch.
void unpool_patches_cuda(Tensor rows, Tensor offsets, std::optional<Tensor> mask, Tensor tokens) {
  if (rows.numel() == 0) return;
  torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const PatchCall call = call_of(tokens, rows, offsets, mask, 0);
  unpool_kernel<<<static_cast<unsigned>(rows.size(0)), kThreads, 0,
                  current_stream(tokens.get_device_index())>>>(call);
  check_launch(kOp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepfusion_native, CUDA, m) {
  m.impl("pack_patches", TORCH_BOX(&pack_patches_cuda));
  m.impl("unpack_patches", TORCH_BOX(&unpack_patches_cuda));
  m.impl("pool_patches", TORCH_BOX(&pool_patches_cuda));
  m.impl("unpool_patches", TORCH_BOX(&unpool_patches_cuda));
}
