"""The C++ plan, dispatch and combine; torch sends them to the CPU or CUDA by device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shared.moe_plan import DispatchPlan

_ops = torch.ops.deepfusion_native

# compute capabilities whose `make gpu` the CUDA kernels have passed; elsewhere only on request
PROVEN_ON: frozenset[tuple[int, int]] = frozenset()

# CUDA: a block counts every expert's slots in shared memory
MAX_EXPERTS = 1024


def declines(name: str, tensor: Tensor, *, num_experts: int = 1, **facts: Any) -> str | None:
    """CUDA serves two- and four-byte floats and up to 1024 experts."""
    if name != "cuda":
        return None
    if tensor.dtype == torch.float64:
        return "rows must be float32, bfloat16 or float16, got float64"
    if num_experts > MAX_EXPERTS:
        return f"moe_plan serves at most {MAX_EXPERTS} experts, got {num_experts}"
    return None


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
        dout, rows, plan.order, plan.slots, _wide(weights, rows), needs_drows, needs_dweights
    )
    return drows, dweights.to(weights.dtype)
