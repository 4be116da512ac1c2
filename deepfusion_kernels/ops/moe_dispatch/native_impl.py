"""The C++ plan, dispatch and combine; torch sends them to the CPU or CUDA by device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shared.moe_plan import DispatchPlan

_ops = torch.ops.deepfusion_native


def _wide(weights: Tensor, rows: Tensor) -> Tensor:
    return weights.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)


def plan(experts: Tensor, num_experts: int) -> DispatchPlan:
    return DispatchPlan(*_ops.moe_plan(experts, num_experts))


def dispatch_forward(hidden: Tensor, plan: DispatchPlan) -> Tensor:
    result: Tensor = _ops.moe_dispatch_forward(hidden, plan.order, plan.slots.shape[1])
    return result


def dispatch_backward(drows: Tensor, plan: DispatchPlan) -> Tensor:
    return combine_forward(drows, plan, None)


def combine_forward(rows: Tensor, plan: DispatchPlan, weights: Tensor | None) -> Tensor:
    wide = None if weights is None else _wide(weights, rows)
    result: Tensor = _ops.moe_combine_forward(rows, plan.slots, wide)
    return result


def combine_backward(
    dout: Tensor,
    rows: Tensor,
    plan: DispatchPlan,
    weights: Tensor,
    needs_drows: bool,
    needs_dweights: bool,
) -> tuple[Tensor, Tensor]:
    drows, dweights = _ops.moe_combine_backward(
        dout, rows, plan.order, _wide(weights, rows), needs_drows, needs_dweights
    )
    return drows, dweights.to(weights.dtype)
