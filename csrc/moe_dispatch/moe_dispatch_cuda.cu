// Rows to their experts and back on CUDA: gathers and reductions only, a warp a row, 16 bytes a
// lane where rows allow it.
//
//   dispatch  rows[r] = hidden[order[r] / K], zeros where order[r] = -1
//   combine   out[t] = sum_k w[t, k] rows[slots[t, k]], k ascending, one rounding
//   backward  drows[slots[t, k]] = w dout[t], dw[t, k] = <dout[t], rows[slots[t, k]]>
//
// NOTE: a plan that leaves its buffers cannot be refused here without waiting for the device; what
// it would have read is NaN instead.
#include "common/float_kind.h"
#include "common/torch_cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <type_traits>

namespace {

using namespace deepfusion;
using torch::headeronly::ScalarType;

constexpr int kWarps = 8;             // rows of a block; not measured
constexpr int kSlab = kWarp * kLane;  // columns a warp takes at once
constexpr int kBatch = 4;             // rows in flight before their sum

template <typename Word>
__device__ __forceinline__ Word all_bits(bool set) {
  return set ? static_cast<Word>(-1) : Word(0);
}
template <>
__device__ __forceinline__ uint4 all_bits<uint4>(bool set) {
  const unsigned word = set ? ~0u : 0u;
  return make_uint4(word, word, word, word);
}

// A row is so many words, whatever its floats are; all bits set are a NaN of every kind.
template <typename Word>
__global__ void __launch_bounds__(kWarps* kWarp)
    dispatch_kernel(const Word* __restrict__ hidden, const int32_t* __restrict__ order,
                    int64_t num_rows, int32_t top_k, int64_t words, Word* __restrict__ rows) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (r >= num_rows) return;
  const int32_t slot = order[r];
  const bool is_real = slot >= 0 && slot < num_rows;
  const Word* from = hidden + static_cast<int64_t>(is_real ? slot / top_k : 0) * words;
  const Word other = all_bits<Word>(slot != -1);
  Word* to = rows + r * words;
#pragma unroll 4
  for (int64_t word = threadIdx.x % kWarp; word < words; word += kWarp)
    to[word] = is_real ? __ldg(from + word) : other;
}

// Eight columns of a row, zeros past its end.
template <Kind kKind, bool kAligned>
__device__ __forceinline__ void load_part(const void* rows, int64_t row, int64_t columns,
                                          int64_t first, float (&out)[kLane]) {
  const char* from = static_cast<const char*>(rows) + row * columns * bytes_of(kKind);
  if constexpr (kAligned) return load8(from, first, kKind, out);
#pragma unroll
  for (int i = 0; i < kLane; ++i)
    out[i] = first + i < columns ? load1(from, first + i, kKind) : 0.0f;
}

template <Kind kKind, bool kAligned>
__device__ __forceinline__ void store_part(void* rows, int64_t row, int64_t columns, int64_t first,
                                           const float (&values)[kLane]) {
  char* to = static_cast<char*>(rows) + row * columns * bytes_of(kKind);
  if constexpr (kAligned) return store8(to, first, kKind, values);
#pragma unroll
  for (int i = 0; i < kLane; ++i)
    if (first + i < columns) store1(to, first + i, kKind, values[i]);
}

struct CombineCall {
  const void *rows, *dout;
  const int32_t *order, *slots;
  const float* weights;
  void *out, *drows;
  float* dweights;
  int64_t tokens, num_rows, columns;
  int32_t top_k;
};

// One token and slab a warp. A sentinel adds 0 times 0; a slot out of its buffer NaN.
template <Kind kKind, bool kAligned>
__global__ void __launch_bounds__(kWarps* kWarp) combine_kernel(CombineCall call) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t first =
      static_cast<int64_t>(blockIdx.y) * kSlab + threadIdx.x % kWarp * static_cast<int64_t>(kLane);
  if (t >= call.tokens || first >= call.columns) return;
  const int32_t* slots = call.slots + t * call.top_k;
  const float* weights = call.weights ? call.weights + t * call.top_k : nullptr;
  float sum[kLane] = {};
  for (int32_t k0 = 0; k0 < call.top_k; k0 += kBatch) {
    float values[kBatch][kLane] = {}, weight[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int32_t k = k0 + j, row = k < call.top_k ? __ldg(slots + k) : -1;
      const bool is_real = row >= 0 && row < call.num_rows;
      weight[j] = is_real ? weights ? __ldg(weights + k) : 1.0f : row == -1 ? 0.0f : NAN;
      if (is_real) load_part<kKind, kAligned>(call.rows, row, call.columns, first, values[j]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
#pragma unroll
      for (int i = 0; i < kLane; ++i) sum[i] = fmaf(weight[j], values[j][i], sum[i]);
    }
  }
  store_part<kKind, kAligned>(call.out, t, call.columns, first, sum);
}

// Slot i a warp, and row i if no slot has it: the K slots of a token stand side by side, so that
// its gradient comes from memory once.
template <Kind kKind, bool kAligned>
__global__ void __launch_bounds__(kWarps* kWarp) combine_backward_kernel(CombineCall call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i >= call.num_rows) return;
  const int64_t lane_first = threadIdx.x % kWarp * kLane, t = i / call.top_k;
  const int32_t row = call.slots[i];
  const bool is_real = row >= 0 && row < call.num_rows;
  const bool is_past_end = call.drows && call.order[i] == -1;
  const float weight = is_real && call.drows ? call.weights[i] : 0.0f;
  float dot = 0.0f;
  for (int64_t first = lane_first; first < call.columns; first += kSlab) {
    float g[kLane] = {}, values[kLane];
    if (is_past_end) store_part<kKind, kAligned>(call.drows, i, call.columns, first, g);
    if (!is_real) continue;
    load_part<kKind, kAligned>(call.dout, t, call.columns, first, g);
    if (call.dweights) {
      load_part<kKind, kAligned>(call.rows, row, call.columns, first, values);
#pragma unroll
      for (int j = 0; j < kLane; ++j) dot = fmaf(g[j], values[j], dot);
    }
    if (call.drows) {
#pragma unroll
      for (int j = 0; j < kLane; ++j) g[j] *= weight;
      store_part<kKind, kAligned>(call.drows, row, call.columns, first, g);
    }
  }
  if (!call.dweights) return;
  dot = warp_sum(dot);
  if (threadIdx.x % kWarp == 0) call.dweights[i] = is_real ? dot : row == -1 ? 0.0f : NAN;
}

unsigned blocks_for(int64_t rows) {
  return static_cast<unsigned>((rows + kWarps - 1) / kWarps);
}

template <typename Word>
void launch_dispatch(const Tensor& hidden, const Tensor& order, int64_t top_k, int64_t bytes,
                     Tensor& rows, cudaStream_t stream) {
  dispatch_kernel<Word><<<blocks_for(order.size(0)), kWarps * kWarp, 0, stream>>>(
      static_cast<const Word*>(hidden.const_data_ptr()), order.const_data_ptr<int32_t>(),
      order.size(0), static_cast<int32_t>(top_k), bytes / static_cast<int64_t>(sizeof(Word)),
      static_cast<Word*>(rows.mutable_data_ptr()));
}

Tensor moe_dispatch_forward_cuda(const Tensor& hidden, const Tensor& order, int64_t top_k) {
  const Kind kind = kind_of(hidden, "moe_dispatch", "hidden");
  torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  const Tensor x = torch::stable::contiguous(hidden), plan = torch::stable::contiguous(order);
  const int64_t num_rows = plan.size(0), columns = x.size(1), bytes = columns * bytes_of(kind);
  check_shape(plan, "moe_dispatch", "plan.order", "[R]", {x.size(0) * top_k});
  Tensor rows = torch::stable::new_empty(x, {num_rows, columns});
  if (num_rows == 0 || columns == 0) return rows;
  const cudaStream_t stream = current_stream(x.get_device_index());
  const bool aligned = is_aligned16(x.const_data_ptr()) && is_aligned16(rows.const_data_ptr());
  if (aligned && bytes % 16 == 0) {
    launch_dispatch<uint4>(x, plan, top_k, bytes, rows, stream);
  } else if (bytes_of(kind) == 4) {
    launch_dispatch<uint32_t>(x, plan, top_k, bytes, rows, stream);
  } else {
    launch_dispatch<uint16_t>(x, plan, top_k, bytes, rows, stream);
  }
  check_launch("moe_dispatch");
  return rows;
}

// body(kind, aligned) with both known when compiling.
template <typename Body>
void with_kind(Kind kind, bool aligned, const Body& body) {
  const auto with_alignment = [&](auto known) {
    return aligned ? body(known, std::true_type()) : body(known, std::false_type());
  };
  switch (kind) {
    case Kind::kFloat:
      return with_alignment(std::integral_constant<Kind, Kind::kFloat>());
    case Kind::kBFloat16:
      return with_alignment(std::integral_constant<Kind, Kind::kBFloat16>());
    case Kind::kHalf:
      return with_alignment(std::integral_constant<Kind, Kind::kHalf>());
  }
}

bool is_vectorised(const CombineCall& call) {
  bool aligned = call.columns % kLane == 0;
  for (const void* pointer : {call.rows, call.dout, static_cast<const void*>(call.out),
                              static_cast<const void*>(call.drows)}) {
    aligned = aligned && is_aligned16(pointer);
  }
  return aligned;
}

Tensor moe_combine_forward_cuda(const Tensor& rows, const Tensor& slots,
                                const std::optional<Tensor>& weights) {
  const Kind kind = kind_of(rows, "moe_combine", "rows");
  torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const Tensor y = torch::stable::contiguous(rows), plan = torch::stable::contiguous(slots);
  const Tensor w = weights ? torch::stable::contiguous(*weights) : plan;
  CombineCall call = {};
  call.tokens = plan.size(0), call.num_rows = y.size(0), call.columns = y.size(1);
  call.top_k = static_cast<int32_t>(plan.size(1));
  Tensor out = torch::stable::new_empty(y, {call.tokens, call.columns});
  if (out.numel() == 0) return out;
  call.rows = y.const_data_ptr();
  call.slots = plan.const_data_ptr<int32_t>();
  call.weights = weights ? w.const_data_ptr<float>() : nullptr;
  call.out = out.mutable_data_ptr();
  const dim3 grid(blocks_for(call.tokens),
                  static_cast<unsigned>((call.columns + kSlab - 1) / kSlab));
  const cudaStream_t stream = current_stream(y.get_device_index());
  with_kind(kind, is_vectorised(call), [&](auto known, auto aligned) {
    combine_kernel<decltype(known)::value, decltype(aligned)::value>
        <<<grid, kWarps * kWarp, 0, stream>>>(call);
  });
  check_launch("moe_combine");
  return out;
}

std::tuple<Tensor, Tensor> moe_combine_backward_cuda(const Tensor& dout, const Tensor& rows,
                                                     const Tensor& order, const Tensor& slots,
                                                     const Tensor& weights, bool needs_drows,
                                                     bool needs_dweights) {
  const Kind kind = kind_of(rows, "moe_combine_backward", "rows");
  torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const Tensor g = torch::stable::contiguous(dout), y = torch::stable::contiguous(rows);
  const Tensor sorted = torch::stable::contiguous(order), plan = torch::stable::contiguous(slots);
  const Tensor w = torch::stable::contiguous(weights);
  CombineCall call = {};
  call.tokens = plan.size(0), call.num_rows = y.size(0), call.columns = y.size(1);
  call.top_k = static_cast<int32_t>(plan.size(1));
  Tensor drows = needs_drows ? torch::stable::new_empty(y, {call.num_rows, call.columns})
                             : torch::stable::new_empty(y, {0});
  Tensor dweights = needs_dweights ? torch::stable::new_empty(w, {call.tokens, call.top_k})
                                   : torch::stable::new_empty(w, {0});
  if (call.num_rows == 0) return {drows, dweights};
  call.rows = y.const_data_ptr();
  call.dout = g.const_data_ptr();
  call.order = sorted.const_data_ptr<int32_t>();
  call.slots = plan.const_data_ptr<int32_t>();
  call.weights = w.const_data_ptr<float>();
  call.drows = needs_drows ? drows.mutable_data_ptr() : nullptr;
  call.dweights = needs_dweights ? dweights.mutable_data_ptr<float>() : nullptr;
  const cudaStream_t stream = current_stream(y.get_device_index());
  with_kind(kind, is_vectorised(call), [&](auto known, auto aligned) {
    combine_backward_kernel<decltype(known)::value, decltype(aligned)::value>
        <<<blocks_for(call.num_rows), kWarps * kWarp, 0, stream>>>(call);
  });
  check_launch("moe_combine_backward");
  return {drows, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepfusion_native, CUDA, m) {
  m.impl("moe_dispatch_forward", TORCH_BOX(&moe_dispatch_forward_cuda));
  m.impl("moe_combine_forward", TORCH_BOX(&moe_combine_forward_cuda));
  m.impl("moe_combine_backward", TORCH_BOX(&moe_combine_backward_cuda));
}
