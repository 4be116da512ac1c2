// All four gradients; the expert's output y is not needed.
//
//   dA' = W2^T dO;  dw = <dA', a>;  da = w dA';  dh = [da u act'(g); da act(g)];  a' = w a
//   dW2 = dO^T a';  dW1 = dh^T x;   dx_t = sum of the rows W1^T dh of its slots
#pragma once

#include "moe_experts/experts.h"

namespace deepfusion::inline DF_LEVEL {

// dh, a' (where wanted) and dw of a block; dh begins with the block's first row.
template <typename T, typename S>
void activation_block(const Experts<T, S>& e, RowBlock block, const S* dout,
                      const typename Operand<S>::Wide* weights, const T* h, unit_t<S>* panel, S* dh,
                      S* scaled, typename Operand<S>::Wide* dweights) {
  using Wide = typename Operand<S>::Wide;
  const auto [_, K, D, F, E] = e.size;
  const T* weight = e.down + block.expert * D * F;
  const unit_t<S>* rows[kBlockRows];
  for (int64_t r = block.begin; r < block.end; ++r) rows[r - block.begin] = units(e.row(dout, r));
  const auto row_at = [&](int64_t i) { return rows[i]; };
  for (int64_t f = 0; f < F; f += kColumns<S>) {
    const int64_t count = std::min(kColumns<S>, F - f);
    pack_columns<S, kColumns<S>>([&](int64_t d) { return weight + d * F + f; }, D, count, panel);
    with_activation(e.activation, [&](auto activation) {
      sweep<S>(row_at, block.end - block.begin, 1, panel, steps_of<S>(D),
               [&](int64_t i, const auto* sums) {
                 const int64_t r = block.begin + i;
                 const Wide w = weights[e.order[r]];
                 const T* gate = h + r * 2 * F + f;
                 const T* up = gate + F;
                 S* dgate = dh + i * 2 * F + f;
                 S* dup = dgate + F;
                 Wide dot = 0;
#pragma omp simd reduction(+ : dot)
                 for (int64_t lane = 0; lane < count; ++lane) {
                   const auto [value, slope] = activate<activation>(to_wide(gate[lane]));
                   const Wide u = to_wide(up[lane]), da = w * sums[lane];
                   dot += sums[lane] * value * u;
                   dgate[lane] = from_wide<S>(da * u * slope);
                   dup[lane] = from_wide<S>(da * value);
                   if (scaled) scaled[r * F + f + lane] = from_wide<S>(w * value * u);
                 }
                 dweights[e.order[r]] = (f ? dweights[e.order[r]] : Wide(0)) + dot;
               });
    });
  }
}

// dx rows = W1^T dh of a block.
template <typename T, typename S>
void input_block(const Experts<T, S>& e, RowBlock block, unit_t<S>* panel, const S* dh,
                 typename Operand<S>::Wide* dx) {
  const auto [_, K, D, F, E] = e.size;
  const T* weight = e.gate_up + block.expert * 2 * F * D;
  const auto row_at = [&](int64_t i) { return units(dh + i * 2 * F); };
  for (int64_t d = 0; d < D; d += kColumns<S>) {
    const int64_t count = std::min(kColumns<S>, D - d);
    pack_columns<S, kColumns<S>>([&](int64_t f) { return weight + f * D + d; }, 2 * F, count,
                                 panel);
    sweep<S>(row_at, block.end - block.begin, 1, panel, steps_of<S>(2 * F),
             [&](int64_t i, const auto* sums) {
               std::copy_n(sums, count, dx + (block.begin + i) * D + d);
             });
  }
}

// out[e] = left^T right over the rows of expert e, rows ascending: [m, n] of left_at(r)[m],
// right_at(r)[n].
template <typename T, typename S, typename Left, typename Right>
void weight_gradient(const Experts<T, S>& e, const Tensor& like, int64_t m, const Left& left_at,
                     int64_t n, const Right& right_at, T* out) {
  const int64_t shares = num_shares(), E = e.size.E;
  int64_t busiest = 0;
  for (int64_t x = 0; x < E; ++x)
    busiest = std::max<int64_t>(busiest, e.offsets[x + 1] - e.offsets[x]);
  const int64_t left_units = std::max(kLeftUnits, steps_of<S>(busiest) * kTileRows);
  Scratch<typename Operand<S>::Wide> panels(like, shares, steps_of<S>(busiest) * kColumns<S>);
  Scratch<typename Operand<S>::Wide> lefts(like, shares, left_units);
  for_rows(E, 1, [&](int64_t x) {
    if (e.offsets[x] == e.offsets[x + 1]) std::fill_n(out + x * m * n, m * n, T(0));
  });
  for_shares(shares, [&](int64_t share) {
    unit_t<S>* panel = reinterpret_cast<unit_t<S>*>(panels.of(share));
    unit_t<S>* left = reinterpret_cast<unit_t<S>*>(lefts.of(share));
    const int64_t num_panels = (n + kColumns<S> - 1) / kColumns<S>;
    for_panels(
        e.offsets, E, share, shares, num_panels, [&](int64_t expert, int64_t first, int64_t last) {
          const int64_t start = e.offsets[expert], depth = e.offsets[expert + 1] - start,
                        steps = steps_of<S>(depth);
          const int64_t width = left_units / (steps * kTileRows) * kTileRows;
          const auto row_at = [&](int64_t i) {
            return left + i / kTileRows * kTileRows * steps + i % kTileRows;
          };
          for (int64_t i0 = 0; i0 < m; i0 += width) {
            const int64_t rows_here = std::min(width, m - i0);
            for (int64_t i = 0; i < rows_here; i += kTileRows) {
              pack_columns<S, kTileRows>([&](int64_t k) { return left_at(start + k) + i0 + i; },
                                         depth, std::min<int64_t>(kTileRows, rows_here - i),
                                         left + i * steps);
            }
            for (int64_t j = first * kColumns<S>; j < std::min(n, last * kColumns<S>);
                 j += kColumns<S>) {
              const int64_t count = std::min(kColumns<S>, n - j);
              pack_columns<S, kColumns<S>>([&](int64_t k) { return right_at(start + k) + j; },
                                           depth, count, panel);
              sweep<S>(row_at, rows_here, kTileRows, panel, steps,
                       [&](int64_t i, const auto* sums) {
                         T* target = out + (expert * m + i0 + i) * n + j;
                         for (int64_t lane = 0; lane < count; ++lane)
                           target[lane] = from_wide<T>(sums[lane]);
                       });
            }
          }
        });
  });
}

// Null pointers are gradients nobody wants. dweights [T, K] begins as zeros.
template <typename T, typename S>
void run_backward(const Experts<T, S>& e, const Tensor& dout, const Tensor& weights,
                  const Tensor& h, T* dhidden, T* dgate_up, T* ddown, Tensor& dweights) {
  using Wide = typename Operand<S>::Wide;
  const auto [_, K, D, F, E] = e.size;
  const int64_t R = e.size.rows(), shares = num_shares();
  Scratch<Wide> panels(dout, shares, steps_of<S>(std::max(D, 2 * F)) * kColumns<S>);
  // frozen experts need dh of one block at a time only
  Scratch<S> dh_memory(dout, dgate_up ? 1 : shares, (dgate_up ? R : kBlockRows) * 2 * F);
  Scratch<S> scaled(dout, 1, ddown ? R * F : 0);
  Scratch<Wide> rows_RD(dout, 1, dhidden ? R * D : 0);
  Wide* dx = rows_RD.of(0);
  const S* dout_rows = dout.const_data_ptr<S>();
  for_shares(shares, [&](int64_t share) {
    unit_t<S>* panel = reinterpret_cast<unit_t<S>*>(panels.of(share));
    for_blocks(e.offsets, E, share, shares, kBlockRows, [&](RowBlock block) {
      S* dh = dgate_up ? dh_memory.of(0) + block.begin * 2 * F : dh_memory.of(share);
      activation_block(e, block, dout_rows, weights.const_data_ptr<Wide>(), h.const_data_ptr<T>(),
                       panel, dh, ddown ? scaled.of(0) : nullptr,
                       dweights.mutable_data_ptr<Wide>());
      if (dhidden) input_block(e, block, panel, dh, dx);
    });
  });
  if (dhidden) combine(dx, static_cast<const Wide*>(nullptr), e.slots, e.size, dhidden);
  const auto row_of = [&](const S* tokens) {
    return [&e, tokens](int64_t r) { return e.row(tokens, r); };
  };
  if (ddown) {
    const S* a = scaled.of(0);
    weight_gradient(e, dout, D, row_of(dout_rows), F, [=](int64_t r) { return a + r * F; }, ddown);
  }
  if (dgate_up) {
    const S* dh = dh_memory.of(0);
    weight_gradient(
        e, dout, 2 * F, [=](int64_t r) { return dh + r * 2 * F; }, D, row_of(e.x), dgate_up);
  }
}

}  // namespace deepfusion::inline DF_LEVEL
