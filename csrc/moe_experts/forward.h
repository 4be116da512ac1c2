// h = W1 x, a = act(g) u, y = W2 a of every routed row; out_t = sum_k w_tk y_tk.
#pragma once

#include "moe_experts/experts.h"

namespace deepfusion::inline DF_LEVEL {

// h and a of a block: a panel holds the gate's columns in its left half and the up's in its right.
template <typename T, typename S>
void up_block(const Experts<T, S>& e, RowBlock block, unit_t<S>* panel, T* h, S* a,
              int64_t a_pitch) {
  const auto [_, K, D, F, E] = e.size;
  const T* weight = e.gate_up + block.expert * 2 * F * D;
  const unit_t<S>* rows[kMostBlockRows];
  for (int64_t r = block.begin; r < block.end; ++r) rows[r - block.begin] = units(e.row(e.x, r));
  const auto row_at = [&](int64_t i) { return rows[i]; };
  const int64_t num_rows = block.end - block.begin;
  for (int64_t f = 0; f < F; f += kLanes<S>) {
    const int64_t count = std::min(kLanes<S>, F - f);
    const T* sources[kColumns<S>] = {};
    for (int64_t lane = 0; lane < count; ++lane) {
      sources[lane] = weight + (f + lane) * D;
      sources[kLanes<S> + lane] = weight + (F + f + lane) * D;
    }
    pack_rows<S>(sources, D, panel);
    const int64_t next = f + kLanes<S>, bytes = sizeof(T) * D;
    const Ahead ahead{weight + next * D, std::clamp<int64_t>(F - next, 0, kLanes<S>), bytes, bytes,
                      F * bytes};
    T* target = h + block.begin * 2 * F + f;
    const auto before = [&](int64_t i, int64_t part, int64_t parts) {
      touch_rows(target, 2 * F, i, num_rows, count);
      touch_rows(target + F, 2 * F, i, num_rows, count);
      return ahead(i, part, parts);
    };
    with_activation(e.activation, [&](auto activation) {
      sweep<S>(row_at, num_rows, 1, panel, steps_of<S>(D), before,
               [&](int64_t i, const auto* sums) {
                 alignas(64) typename Operand<S>::Wide product[kLanes<S>];
                 const auto* up = sums + kLanes<S>;
                 for (int64_t lane = 0; lane < kLanes<S>; ++lane) {
                   product[lane] = activate<activation>(sums[lane]).value * up[lane];
                 }
                 T* row = target + i * 2 * F;
                 round_lanes<S, kLanes<S>>(sums, count, row);
                 round_lanes<S, kLanes<S>>(up, count, row + F);
                 round_lanes<S, kLanes<S>>(product, count, a + i * a_pitch + f);
               });
    });
  }
}

// y = W2 a of a block.
template <typename T, typename S>
void down_block(const Experts<T, S>& e, RowBlock block, unit_t<S>* panel, const S* a,
                int64_t a_pitch, typename Operand<S>::Wide* y) {
  const auto [_, K, D, F, E] = e.size;
  const T* weight = e.down + block.expert * D * F;
  const auto row_at = [&](int64_t i) { return units(a + i * a_pitch); };
  const int64_t num_rows = block.end - block.begin;
  for (int64_t d = 0; d < D; d += kColumns<S>) {
    const int64_t count = std::min(kColumns<S>, D - d);
    const T* sources[kColumns<S>] = {};
    for (int64_t lane = 0; lane < count; ++lane) sources[lane] = weight + (d + lane) * F;
    pack_rows<S>(sources, F, panel);
    const int64_t next = d + kColumns<S>, bytes = sizeof(T) * F;
    const Ahead ahead{weight + next * F, std::clamp<int64_t>(D - next, 0, kColumns<S>), bytes,
                      bytes};
    auto* target = y + block.begin * D + d;
    const auto before = [&](int64_t i, int64_t part, int64_t parts) {
      touch_rows(target, D, i, num_rows, count);
      return ahead(i, part, parts);
    };
    sweep<S>(row_at, num_rows, 1, panel, steps_of<S>(F), before, [&](int64_t i, const auto* sums) {
      round_lanes<S, kColumns<S>>(sums, count, target + i * D);
    });
  }
}

template <typename T, typename S>
void run_forward(const Experts<T, S>& e, const Tensor& hidden, const Tensor& weights, T* h,
                 T* out) {
  using Wide = typename Operand<S>::Wide;
  const auto [_, K, D, F, E] = e.size;
  const int64_t shares = num_shares();
  const int64_t a_pitch = steps_of<S>(F) * Operand<S>::kDepth;
  Scratch<Wide> panels(hidden, shares, steps_of<S>(std::max(D, F)) * kColumns<S>);
  Scratch<S> blocks(hidden, shares, kMostBlockRows * a_pitch);
  // wide: a token's sum is rounded once
  Scratch<Wide> rows_RD(hidden, 1, e.size.rows() * D);
  Wide* y = rows_RD.of(0);
  for_shares(shares, [&](int64_t share) {
    unit_t<S>* panel = reinterpret_cast<unit_t<S>*>(panels.of(share));
    S* a = blocks.of(share);
    // the last pair of an odd row reads one element past F
    if (a_pitch > F) std::fill_n(a, kMostBlockRows * a_pitch, S(0));
    for_blocks(e.offsets, E, share, shares, kBlockRows, [&](RowBlock block) {
      up_block(e, block, panel, h, a, a_pitch);
      down_block(e, block, panel, a, a_pitch, y);
    });
  });
  // rows of sentinels are never read again; zeros make every call's result the same
  std::fill(h + e.offsets[E] * 2 * F, h + e.size.rows() * 2 * F, T(0));
  combine(y, weights.const_data_ptr<Wide>(), e.slots, e.size, out);
}

}  // namespace deepfusion::inline DF_LEVEL
