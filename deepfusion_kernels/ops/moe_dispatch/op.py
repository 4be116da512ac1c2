"""Tokens sorted by expert, and back: `moe_plan`, `moe_dispatch`, `moe_combine`.

Dispatch and combine are each other's gradient: both gather and reduce, neither scatters or adds
atomically, so the same inputs give the same bits. Shapes depend on T, K and E alone, never on ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...checks import INTEGERS, expect, expect_that
from ..shared.moe_plan import DispatchPlan
from . import native_impl, reference

DOORS = ("moe_plan", "moe_dispatch", "moe_combine")
IMPLS = {"reference": reference, "cpu": native_impl, "cuda": native_impl}


def moe_plan(experts: Tensor, num_experts: int, *, backend: str | None = None) -> DispatchPlan:
    """Which row of a buffer sorted by expert each (token, choice) slot takes.

        order[r] = t K + k of row r, or -1 past offsets[E]      slots[t, k] = its row, or -1
        rows of expert e = offsets[e] .. offsets[e+1], in slot order

    experts [T, K] int64 or int32; an id < 0 or >= E = num_experts is a sentinel and gets no row.
    Returns order [R], slots [T, K], offsets [E+1], all int32, with R = T K.

    Raises ValueError for wrong shapes or dtypes, num_experts < 1 and R >= 2^31.
    """
    T, K = expect(experts, "moe_plan", "experts", "T K", dtype=INTEGERS)
    expect_that(num_experts >= 1, "moe_plan", "num_experts", ">= 1", num_experts)
    expect_that(T * K < 2**31, "moe_plan", "experts", "of fewer than 2^31 slots", T * K)
    chosen = backends.choose(backend, experts, IMPLS, num_experts=num_experts)
    return DispatchPlan(*_plan(experts, num_experts, chosen))


def moe_dispatch(hidden: Tensor, plan: DispatchPlan, *, backend: str | None = None) -> Tensor:
    """The rows of hidden [T, D], sorted by expert -> [R, D]; rows past offsets[E] are zeros.

        rows_r = hidden[order_r // K]        dhidden_t = sum_k drows[slots_tk]

    A token whose slots are all sentinels is never read. Raises ValueError if the plan is another's.
    """
    T, _ = expect(hidden, "moe_dispatch", "hidden", "T D")
    _expect_plan(plan, "moe_dispatch", hidden, T)
    order, slots, offsets = plan
    chosen = backends.choose(backend, hidden, IMPLS)
    rows: Tensor = _dispatch(hidden, order, slots, offsets, chosen)
    return rows


def moe_combine(
    rows: Tensor, plan: DispatchPlan, weights: Tensor, *, backend: str | None = None
) -> Tensor:
    """The weighted sum of each token's rows, [R, D] -> [T, D], in the dtype of rows.

        out_t = sum_k w_tk rows[slots_tk]       in float32, k ascending, one rounding
        drows[slots_tk] = w_tk dout_t           dw_tk = <dout_t, rows[slots_tk]>

    weights [T, K], any float, read as float32 (float64 beside float64 rows). A sentinel's weight is
    ignored even if NaN and gets gradient 0. Raises ValueError for wrong shapes, dtypes or devices.
    """
    R, _ = expect(rows, "moe_combine", "rows", "R D")
    T, K = expect(weights, "moe_combine", "weights", "T K", like=rows)
    _expect_plan(plan, "moe_combine", rows, T, K=K, R=R)
    order, slots, offsets = plan
    chosen = backends.choose(backend, rows, IMPLS)
    out: Tensor = _combine(rows, weights, order, slots, offsets, chosen)
    return out


def _expect_plan(plan: DispatchPlan, op: str, like: Tensor, T: int, **sizes: int) -> None:
    i32 = torch.int32
    _, K = expect(plan.slots, op, "plan.slots", "T K", dtype=i32, like=like, T=T, **sizes)
    expect_that(
        sizes.get("R", T * K) == T * K, op, "rows", f"[R, D] with R = {T * K}", sizes.get("R")
    )
    expect(plan.order, op, "plan.order", "R", dtype=i32, like=like, R=T * K)
    expect(plan.offsets, op, "plan.offsets", "E+1", dtype=i32, like=like)


@torch.library.custom_op("deepfusion::moe_plan", mutates_args=())
def _plan(experts: Tensor, num_experts: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(IMPLS[backend].plan(experts, num_experts))


@_plan.register_fake
def _(experts: Tensor, num_experts: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    order = experts.new_empty(experts.shape[0] * experts.shape[1], dtype=torch.int32)
    slots = experts.new_empty(experts.shape, dtype=torch.int32)
    return order, slots, experts.new_empty(num_experts + 1, dtype=torch.int32)


@torch.library.custom_op("deepfusion::moe_dispatch", mutates_args=())
def _dispatch(
    hidden: Tensor, order: Tensor, slots: Tensor, offsets: Tensor, backend: str
) -> Tensor:
    plan = DispatchPlan(order, slots, offsets)
    rows: Tensor = IMPLS[backend].dispatch_forward(hidden, plan)
    return rows


@_dispatch.register_fake
def _(hidden: Tensor, order: Tensor, slots: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return hidden.new_empty((order.shape[0], hidden.shape[1]))


@torch.library.custom_op("deepfusion::moe_dispatch_backward", mutates_args=())
def _dispatch_backward(
    drows: Tensor, order: Tensor, slots: Tensor, offsets: Tensor, backend: str
) -> Tensor:
    plan = DispatchPlan(order, slots, offsets)
    dhidden: Tensor = IMPLS[backend].dispatch_backward(drows, plan)
    return dhidden


@_dispatch_backward.register_fake
def _(drows: Tensor, order: Tensor, slots: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return drows.new_empty((slots.shape[0], drows.shape[1]))


def _save_dispatch(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *plan, ctx.backend = inputs
    ctx.save_for_backward(*plan)


def _dispatch_gradient(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    dhidden = None
    if ctx.needs_input_grad[0]:
        dhidden = _dispatch_backward(drows, *ctx.saved_tensors, ctx.backend)
    return dhidden, None, None, None, None


_dispatch.register_autograd(_dispatch_gradient, setup_context=_save_dispatch)


@torch.library.custom_op("deepfusion::moe_combine", mutates_args=())
def _combine(
    rows: Tensor, weights: Tensor, order: Tensor, slots: Tensor, offsets: Tensor, backend: str
) -> Tensor:
    plan = DispatchPlan(order, slots, offsets)
    out: Tensor = IMPLS[backend].combine_forward(rows, plan, weights)
    return out


@_combine.register_fake
def _(
    rows: Tensor, weights: Tensor, order: Tensor, slots: Tensor, offsets: Tensor, backend: str
) -> Tensor:
    return rows.new_empty((slots.shape[0], rows.shape[1]))


@torch.library.custom_op("deepfusion::moe_combine_backward", mutates_args=())
def _combine_backward(
    dout: Tensor,
    rows: Tensor,
    weights: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    needs_drows: bool,
    needs_dweights: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    plan = DispatchPlan(order, slots, offsets)
    drows, dweights = IMPLS[backend].combine_backward(
        dout, rows, plan, weights, needs_drows, needs_dweights
    )
    return drows, dweights


@_combine_backward.register_fake
def _(
    dout: Tensor,
    rows: Tensor,
    weights: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    needs_drows: bool,
    needs_dweights: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    drows = rows.new_empty(rows.shape if needs_drows else 0)
    return drows, weights.new_empty(weights.shape if needs_dweights else 0)


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _combine_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    needs_drows, needs_dweights = ctx.needs_input_grad[:2]
    drows, dweights = _combine_backward(
        dout, *ctx.saved_tensors, needs_drows, needs_dweights, ctx.backend
    )
    gradients = (drows if needs_drows else None, dweights if needs_dweights else None)
    return *gradients, None, None, None, None


_combine.register_autograd(_combine_gradient, setup_context=_save_combine)
