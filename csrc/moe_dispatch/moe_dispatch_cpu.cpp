// Rows to their experts and back: gathers and reductions only, so no thread writes another's row.
//
//   dispatch  rows[r] = hidden[order[r] / K], zeros where order[r] = -1
//   combine   out[t] = sum_k w[t, k] rows[slots[t, k]], k ascending, one rounding
//   backward  drows[r] = w dout[t], dw[order[r]] = <dout[t], rows[r]>, t = order[r] / K
#include "common/checks.h"
#include "common/cpu.h"
#include "common/moe_plan.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace deepfusion::inline DF_LEVEL {
namespace {

// Columns reduced together: their float32 sums stay in the first-level cache; not measured.
constexpr int64_t kTile = 512;
// Elements below which a second thread does not pay; not measured.
constexpr int64_t kGrain = 32768;

int64_t rows_per_task(int64_t columns) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
}

// A plan is made of plain tensors that anybody can build: no index may leave its buffer.
void check_indices(const Tensor& indices, int64_t end, const char* op, const char* argument) {
  const int32_t* values = indices.const_data_ptr<int32_t>();
  int32_t lowest = -1, highest = -1;
#pragma omp simd reduction(min : lowest) reduction(max : highest)
  for (int64_t i = 0; i < indices.numel(); ++i) {
    lowest = values[i] < lowest ? values[i] : lowest;
    highest = values[i] > highest ? values[i] : highest;
  }
  STD_TORCH_CHECK(lowest >= -1 && highest < end, op, ": ", argument, " must be within -1 .. ",
                  end - 1, ", got ", lowest < -1 ? lowest : highest);
}

std::tuple<Tensor, Tensor, Tensor> moe_plan_cpu(const Tensor& experts, int64_t num_experts) {
  Tensor ids = torch::stable::contiguous(experts);
  const int64_t num_rows = ids.numel();
  Tensor order = torch::stable::new_empty(ids, {num_rows}, ScalarType::Int);
  Tensor slots = torch::stable::new_empty(ids, {ids.size(0), ids.size(1)}, ScalarType::Int);
  Tensor offsets = torch::stable::new_empty(ids, {num_experts + 1}, ScalarType::Int);
  THO_DISPATCH_V2(ids.scalar_type(), "moe_plan", AT_WRAP([&] {
                    moe_plan(ids.const_data_ptr<scalar_t>(), num_rows, num_experts,
                             order.mutable_data_ptr<int32_t>(), slots.mutable_data_ptr<int32_t>(),
                             offsets.mutable_data_ptr<int32_t>());
                  }),
                  ScalarType::Long, ScalarType::Int);
  return {order, slots, offsets};
}

template <typename T>
void gather_rows(const T* hidden, const int32_t* order, int64_t num_rows, int64_t columns,
                 int64_t top_k, T* rows) {
  for_rows(num_rows, rows_per_task(columns), [=](int64_t r) {
    T* row = rows + r * columns;
    if (order[r] < 0) {
      std::fill(row, row + columns, static_cast<T>(0.0f));
    } else {
      const T* token = hidden + (order[r] / top_k) * columns;
      std::copy(token, token + columns, row);
    }
  });
}

Tensor moe_dispatch_forward_cpu(const Tensor& hidden, const Tensor& order, int64_t top_k) {
  Tensor x = torch::stable::contiguous(hidden), plan = torch::stable::contiguous(order);
  const int64_t num_rows = plan.size(0), columns = x.size(1);
  check_indices(plan, x.size(0) * top_k, "moe_dispatch", "plan.order");
  Tensor rows = torch::stable::new_empty(x, {num_rows, columns});
  DF_DISPATCH_FLOAT(x.scalar_type(), "moe_dispatch", [&] {
    gather_rows(x.const_data_ptr<scalar_t>(), plan.const_data_ptr<int32_t>(), num_rows, columns,
                top_k, rows.mutable_data_ptr<scalar_t>());
  });
  return rows;
}

template <typename T>
void combine_token(const T* rows, const int32_t* slots, const wide_t<T>* weights, int64_t columns,
                   int64_t top_k, T* out) {
  wide_t<T> sums[kTile];
  for (int64_t begin = 0; begin < columns; begin += kTile) {
    const int64_t count = std::min(kTile, columns - begin);
    std::fill(sums, sums + count, wide_t<T>(0));
    for (int64_t k = 0; k < top_k; ++k) {
      if (slots[k] < 0) continue;
      const T* row = rows + slots[k] * columns + begin;
      const wide_t<T> weight = weights ? weights[k] : wide_t<T>(1);
#pragma omp simd
      for (int64_t d = 0; d < count; ++d) sums[d] += weight * to_wide(row[d]);
    }
#pragma omp simd
    for (int64_t d = 0; d < count; ++d) out[begin + d] = from_wide<T>(sums[d]);
  }
}

Tensor moe_combine_forward_cpu(const Tensor& rows, const Tensor& slots,
                               const std::optional<Tensor>& weights) {
  Tensor y = torch::stable::contiguous(rows), plan = torch::stable::contiguous(slots);
  const int64_t tokens = plan.size(0), top_k = plan.size(1), columns = y.size(1);
  check_indices(plan, y.size(0), "moe_combine", "plan.slots");
  Tensor w = weights ? torch::stable::contiguous(*weights) : plan;
  Tensor out = torch::stable::new_empty(y, {tokens, columns});
  DF_DISPATCH_FLOAT(y.scalar_type(), "moe_combine", [&] {
    const wide_t<scalar_t>* w_ptr = weights ? w.const_data_ptr<wide_t<scalar_t>>() : nullptr;
    const scalar_t* y_ptr = y.const_data_ptr<scalar_t>();
    const int32_t* plan_ptr = plan.const_data_ptr<int32_t>();
    scalar_t* out_ptr = out.mutable_data_ptr<scalar_t>();
    for_rows(tokens, rows_per_task(columns * top_k), [=](int64_t t) {
      combine_token(y_ptr, plan_ptr + t * top_k, w_ptr ? w_ptr + t * top_k : nullptr, columns,
                    top_k, out_ptr + t * columns);
    });
  });
  return out;
}

template <typename T>
wide_t<T> dot(const T* a, const T* b, int64_t count) {
  wide_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < count; ++d) sum += to_wide(a[d]) * to_wide(b[d]);
  return sum;
}

template <typename T>
void scale_row(const T* from, wide_t<T> weight, int64_t count, T* to) {
#pragma omp simd
  for (int64_t d = 0; d < count; ++d) to[d] = from_wide<T>(weight * to_wide(from[d]));
}

// drows and dweights may be null: what is not wanted is not computed. dweights comes in as zeros.
template <typename T>
void combine_backward(const T* dout, const T* rows, const int32_t* order, const wide_t<T>* weights,
                      int64_t num_rows, int64_t columns, int64_t top_k, T* drows,
                      wide_t<T>* dweights) {
  for_rows(num_rows, rows_per_task(2 * columns), [=](int64_t r) {
    const int32_t slot = order[r];
    if (slot < 0) {
      if (drows) std::fill(drows + r * columns, drows + (r + 1) * columns, static_cast<T>(0.0f));
      return;
    }
    const T* token = dout + (slot / top_k) * columns;
    if (dweights) dweights[slot] = dot(token, rows + r * columns, columns);
    if (drows) scale_row(token, weights[slot], columns, drows + r * columns);
  });
}

// By sorted row: slots, by which CUDA goes, would write the rows of a token far apart.
std::tuple<Tensor, Tensor> moe_combine_backward_cpu(const Tensor& dout, const Tensor& rows,
                                                    const Tensor& order, const Tensor& /*slots*/,
                                                    const Tensor& weights, bool needs_drows,
                                                    bool needs_dweights) {
  Tensor g = torch::stable::contiguous(dout), y = torch::stable::contiguous(rows);
  Tensor plan = torch::stable::contiguous(order), w = torch::stable::contiguous(weights);
  const int64_t num_rows = y.size(0), columns = y.size(1), top_k = w.size(1);
  check_indices(plan, w.numel(), "moe_combine", "plan.order");
  Tensor drows = needs_drows ? torch::stable::new_empty(y, {num_rows, columns})
                             : torch::stable::new_empty(y, {0});
  Tensor dweights = needs_dweights ? torch::stable::new_zeros(w, {w.size(0), top_k})
                                   : torch::stable::new_empty(w, {0});
  DF_DISPATCH_FLOAT(y.scalar_type(), "moe_combine_backward", [&] {
    using wide = wide_t<scalar_t>;
    combine_backward(g.const_data_ptr<scalar_t>(), y.const_data_ptr<scalar_t>(),
                     plan.const_data_ptr<int32_t>(), w.const_data_ptr<wide>(), num_rows, columns,
                     top_k, needs_drows ? drows.mutable_data_ptr<scalar_t>() : nullptr,
                     needs_dweights ? dweights.mutable_data_ptr<wide>() : nullptr);
  });
  return {drows, dweights};
}

}  // namespace
}  // namespace deepfusion::inline DF_LEVEL

DF_REGISTER_CPU(m) {
  m.impl("moe_plan", TORCH_BOX(&deepfusion::moe_plan_cpu));
  m.impl("moe_dispatch_forward", TORCH_BOX(&deepfusion::moe_dispatch_forward_cpu));
  m.impl("moe_combine_forward", TORCH_BOX(&deepfusion::moe_combine_forward_cpu));
  m.impl("moe_combine_backward", TORCH_BOX(&deepfusion::moe_combine_backward_cpu));
}
