"""Which experts a token goes to, with what weight, and the losses that keep a router healthy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import backends
from ...checks import expect, expect_option, expect_that
from . import native_impl, reference
from .options import Options, unpack

DOORS = ("moe_route",)
IMPLS = {"reference": reference, "cpu": native_impl, "cuda": native_impl}


class Routing(NamedTuple):
    """weights [T, K] float32, experts [T, K] int64, counts [E] int64, aux_loss [] float32."""

    weights: Tensor
    experts: Tensor
    counts: Tensor
    aux_loss: Tensor


def moe_route(
    router_logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    order: str = "score_then_topk",
    renormalize: bool = False,
    scale: float = 1.0,
    selection_bias: Tensor | None = None,
    num_groups: int | None = None,
    top_groups: int | None = None,
    group_score: str = "max",
    balance_loss_weight: float = 0.0,
    z_loss_weight: float = 0.0,
    backend: str | None = None,
) -> Routing:
    """The K experts of each token, their weights, and the router's losses.

        s = softmax(z) or sigmoid(z);   c = s + bias  or, topk_then_score,  z + bias
        sel = the K largest c (of the top_groups best groups), lowest index first among equals
        w = scale u / den,  u = s[sel]  or, topk_then_score,  the score of z[sel];  den = sum u or 1
        aux_loss = balance_loss_weight E sum_e f_e P_e + z_loss_weight mean_t lse(z_t)^2

    router_logits [T, E], any float, computed in float32 (float64 stays float64, results too);
    selection_bias [E], never in the weights, no gradient. f_e is the expert's share of tokens, a
    constant, P_e its mean score. A NaN sorts as -inf and makes all K weights of its row NaN.

    Raises ValueError for wrong shapes, dtypes, devices, option names and limits.
    Source: Switch Transformer (balance), ST-MoE (z-loss), DeepSeek-V2 and V3 (groups, bias).
    """
    _, E = expect(router_logits, "moe_route", "router_logits", "T E")
    expect_option(score, "moe_route", "score", ("softmax", "sigmoid"))
    expect_option(order, "moe_route", "order", ("score_then_topk", "topk_then_score"))
    expect_option(group_score, "moe_route", "group_score", ("max", "top2_sum"))
    _expect_numbers(scale, balance_loss_weight, z_loss_weight)
    bias = _expect_bias(selection_bias, router_logits)
    groups = _expect_groups(num_groups, top_groups, group_score, E)
    limit = groups[1] * E // groups[0] if num_groups else E
    expect_that(1 <= top_k <= limit, "moe_route", "top_k", f"within 1 .. {limit}", top_k)
    options = Options(
        top_k,
        *groups,
        score == "sigmoid",
        order == "topk_then_score",
        renormalize,
        group_score == "top2_sum" and bool(num_groups),
        float(scale),
        float(balance_loss_weight),
        float(z_loss_weight),
    )
    if top_k == 1 and options.is_selected_softmax and not torch.compiler.is_compiling():
        warnings.warn(
            "moe_route: the softmax of one selected logit is the constant scale, so the weights "
            "give the router no gradient; use renormalize=False with order='score_then_topk'",
            stacklevel=2,
        )
    chosen = backends.choose(backend, router_logits, IMPLS, num_experts=E)
    outputs = _route(router_logits, bias, options.sizes, options.flags, options.factors, chosen)
    return Routing(*outputs[:4])


def _expect_numbers(scale: float, balance: float, z: float) -> None:
    wanted = "finite and not 0"
    expect_that(scale != 0 and abs(scale) < math.inf, "moe_route", "scale", wanted, scale)
    for name, value in (("balance_loss_weight", balance), ("z_loss_weight", z)):
        expect_that(abs(value) < math.inf, "moe_route", name, "finite", value)


def _expect_bias(bias: Tensor | None, logits: Tensor) -> Tensor | None:
    """The selection bias without its graph: it only chooses."""
    if bias is None:
        return None
    expect(bias, "moe_route", "selection_bias", "E", like=logits, E=logits.shape[1])
    return bias.detach()


def _expect_groups(
    num_groups: int | None, top_groups: int | None, group_score: str, E: int
) -> tuple[int, int]:
    """(num_groups, top_groups), or (0, 0) without groups."""
    if num_groups is None or top_groups is None:
        got = f"num_groups={num_groups}, top_groups={top_groups}"
        both = num_groups is None and top_groups is None
        expect_that(both, "moe_route", "num_groups and top_groups", "given both or neither", got)
        return 0, 0
    divides = num_groups >= 1 and E % num_groups == 0
    expect_that(divides, "moe_route", "num_groups", f"a divisor of E = {E}", num_groups)
    fits = 1 <= top_groups <= num_groups
    expect_that(fits, "moe_route", "top_groups", f"within 1 .. {num_groups}", top_groups)
    if group_score == "top2_sum":
        per_group = E // num_groups
        wanted = "'max' where a group has fewer than 2 experts"
        expect_that(per_group >= 2, "moe_route", "group_score", wanted, "'top2_sum'")
    return num_groups, top_groups


@torch.library.custom_op("deepfusion::moe_route", mutates_args=())
def _route(
    logits: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    flags: Sequence[bool],
    factors: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = unpack(sizes, flags, factors)
    weights, experts, counts, aux_loss, *saved = IMPLS[backend].forward(logits, bias, options)
    picked, lse, mass = saved
    return weights, experts, counts, aux_loss, picked, lse, mass


@_route.register_fake
def _(
    logits: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    flags: Sequence[bool],
    factors: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = unpack(sizes, flags, factors)
    (T, E), K = logits.shape, options.top_k
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    experts = logits.new_empty((T, K), dtype=torch.int64)
    counts = logits.new_empty(E, dtype=torch.int64)
    picked = logits.new_empty((T, K) if options.is_sigmoid else 0, dtype=wide)
    lse = logits.new_empty(T if options.needs_lse else 0, dtype=wide)
    mass = logits.new_empty(T if options.needs_mass else 0, dtype=wide)
    aux_loss = logits.new_empty((), dtype=wide)
    return logits.new_empty((T, K), dtype=wide), experts, counts, aux_loss, picked, lse, mass


@torch.library.custom_op("deepfusion::moe_route_backward", mutates_args=())
def _route_backward(
    dweights: Tensor,
    daux: Tensor,
    saved: Sequence[Tensor],
    sizes: Sequence[int],
    flags: Sequence[bool],
    factors: Sequence[float],
    backend: str,
) -> Tensor:
    options = unpack(sizes, flags, factors)
    dlogits: Tensor = IMPLS[backend].backward(dweights, daux, *saved, options)
    return dlogits


@_route_backward.register_fake
def _(
    dweights: Tensor,
    daux: Tensor,
    saved: Sequence[Tensor],
    sizes: Sequence[int],
    flags: Sequence[bool],
    factors: Sequence[float],
    backend: str,
) -> Tensor:
    logits, _, weights, counts = saved[:4]
    return logits.new_empty((weights.shape[0], counts.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, *ctx.options, ctx.backend = inputs
    sizes, flags, factors = ctx.options
    options = unpack(sizes, flags, factors)
    weights, experts, counts, _, picked, lse, mass = output
    ctx.mark_non_differentiable(experts, counts, picked, lse, mass)
    reads_logits = options.needs_lse or options.needs_mass
    # without the losses the logits need not stay alive until the backward
    logits = logits if reads_logits else logits.new_empty(0)
    ctx.save_for_backward(logits, experts, weights, counts, picked, lse, mass)


def _gradient(
    ctx: Any, dweights: Tensor, dexperts: None, dcounts: None, daux: Tensor, *_: Any
) -> Any:
    dlogits = None
    if ctx.needs_input_grad[0]:
        saved = list(ctx.saved_tensors)
        dlogits = _route_backward(dweights, daux, saved, *ctx.options, ctx.backend)
    return dlogits, None, None, None, None, None


_route.register_autograd(_gradient, setup_context=_save)
