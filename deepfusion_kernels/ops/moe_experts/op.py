"""Grouped gated MLP over routed tokens, one expert's rows at a time.

    h = W1[e] x_t = [g; u];  y_tk = W2[e] (act(g) u);  out_t = sum_k w_tk y_tk,  e = experts[t, k]

Saved for the gradients: the inputs by reference, h [R, 2F] in their dtype, and the plan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...checks import FLOATS, INTEGERS, expect, expect_option, expect_that
from . import native_impl, quack_impl, reference, torch_impl, triton_impl

DOORS = ("moe_experts",)
IMPLS = {
    "reference": reference,
    "cpu": native_impl,
    "triton": triton_impl,
    "torch": torch_impl,
    "quack": quack_impl,
}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
NAME = "moe_experts"


def moe_experts(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    experts: Tensor,
    weights: Tensor,
    *,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of each token's experts, each a gated MLP.

    out_t = sum_k w_tk W2[e] (act(g) u),  [g; u] = W1[e] x_t,  e = experts[t, k]

    hidden [T, D], gate_up_proj [E, 2F, D] (gate rows first), down_proj [E, D, F]: one float dtype;
    experts [T, K] int64 or int32, an id < 0 or >= E takes no part; weights [T, K], any float;
    activation 'silu', 'gelu' or 'gelu_tanh' -> [T, D]. Under autocast the projections and hidden
    take its dtype. Gradients for hidden, both projections and weights, each only if wanted.

    Raises ValueError for wrong shapes, dtypes, devices or options, NotImplementedError for a
    backend that cannot serve. Source: Shazeer et al. 2017 (sparse experts), Shazeer 2020 (GLU).
    """
    expect(hidden, NAME, "hidden", "T D")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, gate_up_proj, down_proj = (
            each.to(dtype) for each in (hidden, gate_up_proj, down_proj)
        )
    _check(hidden, gate_up_proj, down_proj, experts, weights, activation)
    widths = (hidden.shape[1], down_proj.shape[2])
    chosen = backends.choose(backend, hidden, IMPLS, activation=activation, widths=widths)
    out: Tensor = _forward(hidden, gate_up_proj, down_proj, experts, weights, activation, chosen)[0]
    return out


def _check(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
) -> None:
    T, D = hidden.shape
    dtype = hidden.dtype
    E, F2, _ = expect(gate_up_proj, NAME, "gate_up_proj", "E 2F D", dtype=dtype, like=hidden, D=D)
    expect_that(F2 % 2 == 0, NAME, "gate_up_proj", "[E, 2F, D] with an even 2F", F2)
    F = F2 // 2
    expect(down_proj, NAME, "down_proj", "E D F", dtype=dtype, like=hidden, E=E, D=D, F=F)
    _, K = expect(experts, NAME, "experts", "T K", dtype=INTEGERS, like=hidden, T=T)
    expect(weights, NAME, "weights", "T K", dtype=FLOATS, like=hidden, T=T, K=K)
    expect_that(min(D, F, E, K) > 0, NAME, "D, F, E and K", "positive", [D, F, E, K])
    expect_that(T * K < 2**31, NAME, "T * K", "below 2^31", T * K)
    expect_option(activation, NAME, "activation", ACTIVATIONS)


@torch.library.custom_op("deepfusion::moe_experts", mutates_args=())
def _forward(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # the door has already lowered what autocast asks for; float32 sums inside stay float32
    with torch.autocast(hidden.device.type, enabled=False):
        out, h, order, slots, offsets = IMPLS[backend].forward(
            hidden, gate_up_proj, down_proj, experts, weights, activation
        )
    return out, h, order, slots, offsets


@_forward.register_fake
def _(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    E, F2, D = gate_up_proj.shape
    T, K = experts.shape
    ints = [
        torch.empty(shape, dtype=torch.int32, device=hidden.device)
        for shape in ((T * K,), (T, K), (E + 1,))
    ]
    return hidden.new_empty(T, D), hidden.new_empty(T * K, F2), ints[0], ints[1], ints[2]


@torch.library.custom_op("deepfusion::moe_experts_backward", mutates_args=())
def _backward(
    dout: Tensor,
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    experts: Tensor,
    weights: Tensor,
    h: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    activation: str,
    backend: str,
    needs_dhidden: bool,
    needs_dgate_up: bool,
    needs_ddown: bool,
    needs_dweights: bool,
) -> list[Tensor]:
    needs = (needs_dhidden, needs_dgate_up, needs_ddown, needs_dweights)
    if experts.shape[0] == 0:
        inputs = (hidden, gate_up_proj, down_proj, weights)
        return [torch.zeros_like(each) for each, need in zip(inputs, needs, strict=True) if need]
    with torch.autocast(hidden.device.type, enabled=False):
        grads = IMPLS[backend].backward(
            dout,
            *(hidden, gate_up_proj, down_proj, experts, weights, h, order, slots, offsets),
            activation,
            needs,
        )
    return list(grads)


@_backward.register_fake
def _(
    dout: Tensor,
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    experts: Tensor,
    weights: Tensor,
    h: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    activation: str,
    backend: str,
    needs_dhidden: bool,
    needs_dgate_up: bool,
    needs_ddown: bool,
    needs_dweights: bool,
) -> list[Tensor]:
    needs = (needs_dhidden, needs_dgate_up, needs_ddown, needs_dweights)
    inputs = (hidden, gate_up_proj, down_proj, weights)
    return [
        each.new_empty(each.shape) for each, needed in zip(inputs, needs, strict=True) if needed
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation, ctx.backend = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    # else autograd hands the backward zeros as large as h
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *saved)


def _gradient(ctx: Any, dout: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, gate_up, down, _, weights = ctx.needs_input_grad[:5]
    needs = (hidden, gate_up, down, weights)
    if dout is None:
        return (None,) * 7
    grads = iter(_backward(dout, *ctx.saved_tensors, ctx.activation, ctx.backend, *needs))
    dhidden, dgate_up, ddown, dweights = (next(grads) if needed else None for needed in needs)
    return dhidden, dgate_up, ddown, None, dweights, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)
