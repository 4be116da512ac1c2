"""Rows to their experts and back, in plain torch.

    dispatch  rows_r = hidden[order_r // K], zeros past offsets[E]
    combine   out_t = sum_k w_tk rows[slots_tk], k ascending, sentinels skipped
    backward  dhidden_t = sum_k drows[slots_tk]
              drows[slots_tk] = w_tk dout_t,  dw_tk = <dout_t, rows[slots_tk]>

Sums are in float32 (float64 for float64 rows) and are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..shared.moe_plan import DispatchPlan
from ..shared.moe_plan import plan as plan


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index] in the accumulator's dtype, zeros where the index is -1."""
    if rows.shape[0] == 0:
        return rows.new_zeros((index.shape[0], rows.shape[1]), dtype=_wide(rows.dtype))
    picked = rows[index.clamp(min=0).to(torch.int64)].to(_wide(rows.dtype))
    # a product with 0 would let NaN through
    return torch.where((index >= 0)[:, None], picked, 0.0)


def _tokens(order_R: Tensor, top_k: int) -> Tensor:
    return torch.where(order_R >= 0, order_R // max(top_k, 1), -1)


def dispatch_forward(hidden: Tensor, plan: DispatchPlan) -> Tensor:
    return _gather(hidden, _tokens(plan.order, plan.slots.shape[1])).to(hidden.dtype)


def dispatch_backward(drows: Tensor, plan: DispatchPlan) -> Tensor:
    return combine_forward(drows, plan, None)


def combine_forward(rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
    T, K = plan.slots.shape
    out_TD = rows.new_zeros((T, rows.shape[1]), dtype=_wide(rows.dtype))
    for k in range(K):
        term_TD = _gather(rows, plan.slots[:, k])
        if weights is not None:
            is_real_T1 = (plan.slots[:, k] >= 0)[:, None]
            weight_T1 = weights[:, k, None].to(term_TD.dtype)
            term_TD = torch.where(is_real_T1, weight_T1 * term_TD, 0.0)
        out_TD = out_TD + term_TD
    return out_TD.to(rows.dtype)


def combine_backward(
    dout: Tensor,
    rows: Tensor,
    plan: DispatchPlan,
    weights: Tensor,
    needs_drows: bool,
    needs_dweights: bool,
) -> tuple[Tensor, Tensor]:
    drows_RD, dweights_TK = rows.new_empty(0), weights.new_empty(0)
    K = plan.slots.shape[1]
    if needs_drows:
        dout_RD = _gather(dout, _tokens(plan.order, K))
        weight_R1 = _gather(weights.reshape(-1, 1).to(dout_RD.dtype), plan.order)
        drows_RD = torch.where((plan.order >= 0)[:, None], weight_R1 * dout_RD, 0.0).to(rows.dtype)
    if needs_dweights:
        dout_TD = dout.to(_wide(rows.dtype))
        dweights_TK = torch.empty_like(weights, memory_format=torch.contiguous_format)
        for k in range(K):
            is_real_T = plan.slots[:, k] >= 0
            dot_T = (dout_TD * _gather(rows, plan.slots[:, k])).sum(-1)
            dweights_TK[:, k] = torch.where(is_real_T, dot_T, 0.0).to(weights.dtype)
    return drows_RD, dweights_TK
