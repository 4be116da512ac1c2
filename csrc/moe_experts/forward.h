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
  const unit_t<S>* rows[kBlockRows];
  for (int64_t r = block.begin; r < block.end; ++r) rows[r - block.begin] = units(e.row(e.x, r));
  const auto row_at = [&](int64_t i) { return rows[i]; };
  for (int64_t f = 0; f < F; f += kLanes<S>) {
    const int64_t count = std::min(kLanes<S>, F - f);
    const T* sources[kColumns<S>] = {};
    for (int64_t lane = 0; lane < count; ++lane) {
      sources[lane] = weight + (f + lane) * D;
      sources[kLanes<S> + lane] = weight + (F + f + lane) * D;
    }
    pack_rows<S>(sources, D, panel);
    with_activation(e.activation, [&](auto activation) {
      sweep<S>(row_at, block.end - block.begin, 1, panel, steps_of<S>(D),
               [&](int64_t i, const auto* sums) {
                 T* gate = h + (block.begin + i) * 2 * F + f;
                 T* up = gate + F;
                 S* product = a + i * a_pitch + f;
                 for (int64_t lane = 0; lane < count; ++lane) {
                   const auto g = sums[lane], u = sums[kLanes<S> + lane];
                   gate[lane] = from_wide<T>(g);
                   up[lane] = from_wide<T>(u);
                   product[lane] = from_wide<S>(activate<activation>(g).value * u);
                 }
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
  for (int64_t d = 0; d < D; d += kColumns<S>) {
    const int64_t count = std::min(kColumns<S>, D - d);
    const T* sources[kColumns<S>] = {};
    for (int64_t lane = 0; lane < count; ++lane) sources[lane] = weight + (d + lane) * F;
    pack_rows<S>(sources, F, panel);
    sweep<S>(row_at, block.end - block.begin, 1, panel, steps_of<S>(F),
             [&](int64_t i, const auto* sums) {
               std::copy_n(sums, count, y + (block.begin + i) * D + d);
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
  Scratch<S> blocks(hidden, shares, kBlockRows * a_pitch);
  // wide: a token's sum is rounded once
  Scratch<Wide> rows_RD(hidden, 1, e.size.rows() * D);
  Wide* y = rows_RD.of(0);
  for_shares(shares, [&](int64_t share) {
    unit_t<S>* panel = reinterpret_cast<unit_t<S>*>(panels.of(share));
    S* a = blocks.of(share);
    // the last pair of an odd row reads one element past F
    if (a_pitch > F) std::fill_n(a, kBlockRows * a_pitch, S(0));
    for_blocks(e.offsets, E, share, shares, kBlockRows, [&](RowBlock block) {
      up_block(e, block, panel, h, a, a_pitch);
      down_block(e, block, panel, a, a_pitch, y);
    });
  });
  std::fill(h + e.offsets[E] * 2 * F, h + e.size.rows() * 2 * F, T(0));
  combine(y, weights.const_data_ptr<Wide>(), e.slots, e.size, out);
}

}  // namespace deepfusion::inline DF_LEVEL
