// All four gradients; the expert's output y is not needed.
//
//   dA' = W2^T dO;  dw = <dA', a>;  da = w dA';  dh = [da u act'(g); da act(g)];  a' = w a
//   dW2 = dO^T a';  dW1 = dh^T x;   dx_t = sum of the rows W1^T dh of its slots
#pragma once

#include "moe_experts/weight_gradient.h"

#include <numeric>

namespace deepfusion::inline DF_LEVEL {

// Two panels of the columns of a weight [depth, pitch]: one is multiplied while the next is packed.
template <typename S>
struct Panels {
  unit_t<S>* now;
  unit_t<S>* next;
  template <typename T>
  void pack_first(const T* weight, int64_t depth, int64_t pitch) {
    pack_columns<S, kColumns<S>>([&](int64_t k) { return weight + k * pitch; }, depth,
                                 std::min(kColumns<S>, pitch), next);
  }
  // The panel of columns from `at` on, and what packs the one behind it.
  template <typename T>
  std::pair<const unit_t<S>*, PackAhead<S, T>> take(const T* weight, int64_t depth, int64_t pitch,
                                                    int64_t at) {
    std::swap(now, next);
    const int64_t behind = at + kColumns<S>;
    return {now, {weight + behind, depth, pitch, pitch - behind, next}};
  }
};

// One row's columns of a panel: dh and a' from dA' (`sums`) and h; their part of dw is added to
// kLanes sums, since a row is summed across only once.
template <typename S, Activation ACT, typename T, typename W, typename Count>
inline void gate_gradient(const T* h, int64_t F, const W* sums, Count count, W weight, S* dh,
                          S* scaled, W* dots) {
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
  round_lanes<S, N>(dgate, count, dh);
  round_lanes<S, N>(dup, count, dh + F);
  for (int64_t lane = 0; lane < kLanes<S>; ++lane) {
    const int64_t other = lane + kLanes<S>;
    dots[lane] += lane < count ? sums[lane] * act[lane] : W(0);
    dots[lane] += other < count ? sums[other] * act[other] : W(0);
  }
  if (scaled) {
    for (int64_t lane = 0; lane < N; ++lane) act[lane] *= weight;
    round_lanes<S, N>(act, count, scaled);
  }
}

// dh, a' (where wanted) and dw of a block; dh and a' begin with the block's first row.
template <typename T, typename S>
void activation_block(const Experts<T, S>& e, RowBlock block, const S* dout,
                      const typename Operand<S>::Wide* weights, const T* h, Panels<S> panels, S* dh,
                      S* scaled, typename Operand<S>::Wide* dweights) {
  using Wide = typename Operand<S>::Wide;
  const auto [_, K, D, F, E] = e.size;
  const T* weight = e.down + block.expert * D * F;
  const unit_t<S>* rows[kMostBlockRows];
  for (int64_t r = block.begin; r < block.end; ++r) rows[r - block.begin] = units(e.row(dout, r));
  const auto row_at = [&](int64_t i) { return rows[i]; };
  const int64_t num_rows = block.end - block.begin;
  alignas(64) Wide dots[kMostBlockRows][kLanes<S>];
  std::fill_n(dots[0], num_rows * kLanes<S>, Wide(0));
  panels.pack_first(weight, D, F);
  for (int64_t f = 0; f < F; f += kColumns<S>) {
    const int64_t count = std::min(kColumns<S>, F - f);
    const auto taken = panels.take(weight, D, F, f);
    const T* source = h + block.begin * 2 * F + f;
    const auto before = [&](int64_t i, int64_t part, int64_t parts) {
      touch_rows(source, 2 * F, i, num_rows, count);
      touch_rows(source + F, 2 * F, i, num_rows, count);
      touch_rows(dh + f, 2 * F, i, num_rows, count);
      touch_rows(dh + F + f, 2 * F, i, num_rows, count);
      if (scaled) touch_rows(scaled + f, F, i, num_rows, count);
      return taken.second(i, part, parts);
    };
    with_activation(e.activation, [&](auto activation) {
      sweep<S>(row_at, num_rows, 1, taken.first, steps_of<S>(D), before,
               [&](int64_t i, const auto* sums) {
                 const Wide gate_weight = weights[e.order[block.begin + i]];
                 S* row_dh = dh + i * 2 * F + f;
                 S* row_a = scaled ? scaled + i * F + f : nullptr;
                 const auto run = [&](auto lanes) {
                   gate_gradient<S, activation>(source + i * 2 * F, F, sums, lanes, gate_weight,
                                                row_dh, row_a, dots[i]);
                 };
                 // a constant number of lanes needs no masks
                 if (count == kColumns<S>) {
                   run(std::integral_constant<int64_t, kColumns<S>>());
                 } else {
                   run(count);
                 }
               });
    });
  }
  for (int64_t i = 0; i < num_rows; ++i)
    dweights[e.order[block.begin + i]] = std::accumulate(dots[i], dots[i] + kLanes<S>, Wide(0));
}

// dx rows = W1^T dh of a block.
template <typename T, typename S>
void input_block(const Experts<T, S>& e, RowBlock block, Panels<S> panels, const S* dh,
                 typename Operand<S>::Wide* dx) {
  const auto [_, K, D, F, E] = e.size;
  const T* weight = e.gate_up + block.expert * 2 * F * D;
  const auto row_at = [&](int64_t i) { return units(dh + i * 2 * F); };
  const int64_t num_rows = block.end - block.begin;
  panels.pack_first(weight, 2 * F, D);
  for (int64_t d = 0; d < D; d += kColumns<S>) {
    const int64_t count = std::min(kColumns<S>, D - d);
    const auto taken = panels.take(weight, 2 * F, D, d);
    auto* target = dx + block.begin * D + d;
    const auto before = [&](int64_t i, int64_t part, int64_t parts) {
      touch_rows(target, D, i, num_rows, count);
      return taken.second(i, part, parts);
    };
    sweep<S>(row_at, num_rows, 1, taken.first, steps_of<S>(2 * F), before,
             [&](int64_t i, const auto* sums) {
               round_lanes<S, kColumns<S>>(sums, count, target + i * D);
             });
  }
}

// Zeros for the experts without rows.
template <typename T, typename S>
void clear_unused(const Experts<T, S>& e, int64_t share, int64_t shares, T* dgate_up, T* ddown) {
  const auto [_, K, D, F, E] = e.size;
  for (int64_t x = share; x < E; x += shares) {
    if (e.offsets[x] < e.offsets[x + 1]) continue;
    if (ddown) std::fill_n(ddown + x * D * F, D * F, T(0));
    if (dgate_up) std::fill_n(dgate_up + x * 2 * F * D, 2 * F * D, T(0));
  }
}

// Null pointers are gradients nobody wants. dweights [T, K] begins as zeros.
//
// An expert that lies in one share passes through all its products at once: its dh and a' stay in
// the cache. Only experts cut by the end of a share keep theirs until all shares have come by.
template <typename T, typename S>
void run_backward(const Experts<T, S>& e, const Tensor& dout, const Tensor& weights,
                  const Tensor& h, T* dhidden, T* dgate_up, T* ddown, Tensor& dweights) {
  using Wide = typename Operand<S>::Wide;
  const auto [_, K, D, F, E] = e.size;
  const int64_t shares = num_shares();
  const Cuts cuts(e.offsets, E, shares);
  const int64_t panel_units = steps_of<S>(std::max(D, 2 * F)) * kColumns<S>;
  Scratch<Wide> panel_memory(dout, shares, 2 * panel_units);
  // frozen experts need dh of one block at a time only
  Scratch<S> own_dh(
      dout, shares,
      (dgate_up ? std::max(cuts.busiest_whole, kMostBlockRows) : kMostBlockRows) * 2 * F);
  Scratch<S> own_a(dout, shares, ddown ? cuts.busiest_whole * F : 0);
  Scratch<S> cut_dh(dout, 1, dgate_up ? cuts.rows * 2 * F : 0);
  Scratch<S> cut_a(dout, 1, ddown ? cuts.rows * F : 0);
  Scratch<Wide> rows_RD(dout, 1, dhidden ? e.size.rows() * D : 0);
  const S* dout_rows = dout.const_data_ptr<S>();
  FactorMemory<S> memory(dout, shares, cuts.busiest);
  const auto gradients = [&](const S* dh, const S* a, int64_t first, const auto& body) {
    const auto dout_at = [&](int64_t r) { return e.row(dout_rows, r); };
    const auto a_at = [=, F = F](int64_t r) { return a + (r - first) * F; };
    const auto dh_at = [=, F = F](int64_t r) { return dh + (r - first) * 2 * F; };
    const auto x_at = [&](int64_t r) { return e.row(e.x, r); };
    if (ddown) body(WeightGradient{ddown, D, dout_at, F, a_at});
    if (dgate_up) body(WeightGradient{dgate_up, 2 * F, dh_at, D, x_at});
  };
  for_shares(shares, [&](int64_t share) {
    unit_t<S>* memory_of_panels = reinterpret_cast<unit_t<S>*>(panel_memory.of(share));
    const Panels<S> panels{memory_of_panels, memory_of_panels + panel_units};
    for_blocks(e.offsets, E, share, shares, kBlockRows, [&](RowBlock block) {
      const int64_t start = e.offsets[block.expert], place = cuts.place[block.expert];
      const bool is_whole = place < 0;
      S* dh = is_whole ? own_dh.of(share) : cut_dh.of(0) + place * 2 * F;
      S* a = is_whole ? own_a.of(share) : cut_a.of(0) + place * F;
      const int64_t row = block.begin - start;
      S* block_dh = dgate_up ? dh + row * 2 * F : own_dh.of(share);
      activation_block(e, block, dout_rows, weights.const_data_ptr<Wide>(), h.const_data_ptr<T>(),
                       panels, block_dh, ddown ? a + row * F : nullptr,
                       dweights.mutable_data_ptr<Wide>());
      if (dhidden) input_block(e, block, panels, block_dh, rows_RD.of(0));
      if (!is_whole || block.end < e.offsets[block.expert + 1]) return;
      gradients(dh, a, start, [&](const auto& g) {
        weight_strips(e, g, block.expert, 0, g.num_strips(), memory.of(share));
      });
    });
    clear_unused(e, share, shares, dgate_up, ddown);
  });
  if (cuts.rows && (ddown || dgate_up)) {
    for_parts(e.offsets, cuts.place, shares, [&](int64_t x, int64_t share, const auto& part) {
      const int64_t place = cuts.place[x];
      gradients(cut_dh.of(0) + place * 2 * F, cut_a.of(0) + place * F, e.offsets[x],
                [&](const auto& g) {
                  const auto [first, last] = part(g.num_strips());
                  weight_strips(e, g, x, first, last, memory.of(share));
                });
    });
  }
  if (dhidden) combine(rows_RD.of(0), static_cast<const Wide*>(nullptr), e.slots, e.size, dhidden);
}

}  // namespace deepfusion::inline DF_LEVEL
