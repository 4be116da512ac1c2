// All four gradients; the expert's output y is not needed.
//
//   dA' = W2^T dO;  dw = <dA', a>;  da = w dA';  dh = [da u act'(g); da act(g)];  a' = w a
//   dW2 = dO^T a';  dW1 = dh^T x;   dx_t = sum of the rows W1^T dh of its slots
#pragma once

#include "moe_experts/experts.h"

namespace deepfusion::inline DF_LEVEL {

// One row's columns of a panel: dh and a' from dA' (`sums`) and h; returns their part of dw.
template <typename S, Activation ACT, typename T, typename W>
inline W gate_gradient(const T* h, int64_t F, const W* sums, int64_t count, W weight, S* dh,
                       S* scaled) {
  constexpr int64_t N = kColumns<S>;
  alignas(64) W gate[N], up[N], dgate[N], dup[N], act[N];
  load_lanes<N>(h, count, gate);
  load_lanes<N>(h + F, count, up);
  for (int64_t lane = 0; lane < N; ++lane) {
    const auto [value, slope] = activate<ACT>(gate[lane]);
    const W da = weight * sums[lane];
    dgate[lane] = da * up[lane] * slope;
    dup[lane] = da * value;
    act[lane] = value * up[lane];
  }
  store_lanes<N>(dgate, count, dh);
  store_lanes<N>(dup, count, dh + F);
  W dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t lane = 0; lane < count; ++lane) dot += sums[lane] * act[lane];
  if (scaled) {
    for (int64_t lane = 0; lane < N; ++lane) act[lane] *= weight;
    store_lanes<N>(act, count, scaled);
  }
  return dot;
}

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
    const int64_t next = f + kColumns<S>, bytes = sizeof(T) * kColumns<S>;
    const Ahead ahead{weight + next, next < F ? D : 0, F * int64_t{sizeof(T)}, bytes};
    with_activation(e.activation, [&](auto activation) {
      sweep<S>(row_at, block.end - block.begin, 1, panel, steps_of<S>(D), ahead,
               [&](int64_t i, const auto* sums) {
                 const int64_t r = block.begin + i, slot = e.order[r];
                 const Wide dot = gate_gradient<S, activation>(
                     h + r * 2 * F + f, F, sums, count, weights[slot], dh + i * 2 * F + f,
                     scaled ? scaled + r * F + f : nullptr);
                 dweights[slot] = (f ? dweights[slot] : Wide(0)) + dot;
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
    const int64_t next = d + kColumns<S>, bytes = sizeof(T) * kColumns<S>;
    const Ahead ahead{weight + next, next < D ? 2 * F : 0, D * int64_t{sizeof(T)}, bytes};
    sweep<S>(row_at, block.end - block.begin, 1, panel, steps_of<S>(2 * F), ahead,
             [&](int64_t i, const auto* sums) {
               store_lanes<kColumns<S>>(sums, count, dx + (block.begin + i) * D + d);
             });
  }
}

// One projection's gradient: out[e] = left^T right over the rows of expert e, rows ascending, with
// left_at(r)[m] and right_at(r)[n].
template <typename T, typename Left, typename Right>
struct WeightGradient {
  T* out;
  int64_t m;
  Left left_at;
  int64_t n;
  Right right_at;
};

// A share's panels of one weight gradient.
template <typename T, typename S, typename Gradient>
void weight_panels(const Experts<T, S>& e, const Gradient& g, int64_t share, int64_t shares,
                   unit_t<S>* left, int64_t left_units, unit_t<S>* panel) {
  const int64_t panels = (g.n + kColumns<S> - 1) / kColumns<S>;
  const auto body = [&](int64_t expert, int64_t first, int64_t last) {
    const int64_t start = e.offsets[expert], depth = e.offsets[expert + 1] - start;
    const int64_t steps = steps_of<S>(depth);
    const int64_t width = left_units / (steps * kTileRows) * kTileRows;
    const auto row_at = [&](int64_t i) {
      return left + i / kTileRows * kTileRows * steps + i % kTileRows;
    };
    for (int64_t i0 = 0; i0 < g.m; i0 += width) {
      const int64_t rows = std::min(width, g.m - i0);
      for (int64_t i = 0; i < rows; i += kTileRows) {
        pack_columns<S, kTileRows>([&](int64_t k) { return g.left_at(start + k) + i0 + i; }, depth,
                                   std::min<int64_t>(kTileRows, rows - i), left + i * steps);
      }
      for (int64_t j = first * kColumns<S>; j < std::min(g.n, last * kColumns<S>);
           j += kColumns<S>) {
        const int64_t count = std::min(kColumns<S>, g.n - j);
        pack_columns<S, kColumns<S>>([&](int64_t k) { return g.right_at(start + k) + j; }, depth,
                                     count, panel);
        T* target = g.out + (expert * g.m + i0) * g.n + j;
        sweep<S>(row_at, rows, kTileRows, panel, steps, [&](int64_t i, const auto* sums) {
          store_lanes<kColumns<S>>(sums, count, target + i * g.n);
        });
      }
    }
  };
  for_panels(e.offsets, e.size.E, share, shares, panels, body);
}

// Each gradient whose `out` is not null.
template <typename T, typename S, typename... Gradients>
void weight_gradients(const Experts<T, S>& e, const Tensor& like, const Gradients&... gradients) {
  using Wide = typename Operand<S>::Wide;
  const int64_t shares = num_shares(), E = e.size.E;
  int64_t busiest = 0;
  for (int64_t x = 0; x < E; ++x) {
    busiest = std::max<int64_t>(busiest, e.offsets[x + 1] - e.offsets[x]);
  }
  const int64_t left_units = std::max(kLeftUnits, steps_of<S>(busiest) * kTileRows);
  Scratch<Wide> panels(like, shares, steps_of<S>(busiest) * kColumns<S>);
  Scratch<Wide> lefts(like, shares, left_units);
  const auto clear = [&](const auto& g, int64_t x) {
    if (g.out) std::fill_n(g.out + x * g.m * g.n, g.m * g.n, T(0));
  };
  for_rows(E, 1, [&](int64_t x) {
    if (e.offsets[x] == e.offsets[x + 1]) (clear(gradients, x), ...);
  });
  for_shares(shares, [&](int64_t share) {
    unit_t<S>* panel = reinterpret_cast<unit_t<S>*>(panels.of(share));
    unit_t<S>* left = reinterpret_cast<unit_t<S>*>(lefts.of(share));
    const auto run = [&](const auto& g) {
      if (g.out) weight_panels(e, g, share, shares, left, left_units, panel);
    };
    (run(gradients), ...);
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
  if (!ddown && !dgate_up) return;
  const S* a = scaled.of(0);
  const S* dh = dh_memory.of(0);
  const auto dout_at = [&](int64_t r) { return e.row(dout_rows, r); };
  const auto scaled_at = [&](int64_t r) { return a + r * F; };
  const auto dh_at = [&](int64_t r) { return dh + r * 2 * F; };
  const auto x_at = [&](int64_t r) { return e.row(e.x, r); };
  weight_gradients(e, dout, WeightGradient{ddown, D, dout_at, F, scaled_at},
                   WeightGradient{dgate_up, 2 * F, dh_at, D, x_at});
}

}  // namespace deepfusion::inline DF_LEVEL
