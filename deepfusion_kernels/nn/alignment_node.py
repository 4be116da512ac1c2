"""Projection, attention and loss under one autograd node.

    X = patches W + c      Q, K, V = X Wqkv      Y = attention
loss = sum_j s_j sum_n v_n |U_j Y_jn + u_j - G_jn|^2 / (M sum v)

The loss comes last and is a scalar: dY, dU and du are formed with it. The attention then needs
delta = rowsum(dY * Y) only, so X, QKV, L, dY and delta are kept, and Y is not (but see `at_once`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.shared import patches
from ..ops.shared.gradients import where_wanted
from ..ops.shared.watched import is_watched
from ..ops.view_aligned_attention.joined.steps import at_once
from .alignment_steps import gradients, loss_and_kept

aligned_loss = torch.library.custom_op(
    "deepfusion::view_aligned_attention", loss_and_kept, mutates_args=()
)
_gradients = torch.library.custom_op(
    "deepfusion::view_aligned_attention_backward", gradients, mutates_args=()
)


@aligned_loss.register_fake
def _(
    stages: list[Tensor],
    targets: list[Tensor],
    patch_weight: Tensor,
    patch_bias: Tensor,
    qkv_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    patch_embedding: Tensor | None,
    stage_embedding: Tensor | None,
    offsets_BQ1: Tensor,
    target_offsets: Tensor,
    mask_BL: Tensor | None,
    target_mask: Tensor | None,
    stage_weights: list[float],
    num_heads: int,
    patch_size: int,
    causal: bool,
    target_norm: bool,
    needs_hidden: bool,
    needs_head: bool,
    needs_head_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, cuts), (S, M, D) = offsets_BQ1.shape, head_weight.shape
    Q, wide = cuts - 1, patches.wide_dtype(patch_weight.dtype)

    def empty(*shape: int, needed: bool = True, dtype: torch.dtype = wide) -> Tensor:
        return patch_weight.new_empty(shape if needed else (0,), dtype=dtype)

    narrow = patch_weight.dtype if needs_hidden else wide
    stats = (B, num_heads, S * Q)
    return (
        empty(),
        empty(),
        empty(B, Q, dtype=torch.bool),
        empty(S, B, Q, D, needed=needs_hidden, dtype=narrow),
        empty(S, B, Q, 3 * D, needed=needs_hidden, dtype=narrow),
        empty(*stats, needed=needs_hidden),
        empty(S, B, Q, D, needed=needs_hidden, dtype=narrow),
        empty(*stats, needed=needs_hidden),
        empty(S, M, D, needed=needs_head),
        empty(S, M, needed=needs_head_bias),
    )


@_gradients.register_fake
def _(
    upstream: Tensor,
    kept: list[Tensor],
    stages: list[Tensor],
    patch_weight: Tensor,
    qkv_weight: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    num_heads: int,
    patch_size: int,
    causal: bool,
    needs_stages: list[bool],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    needs_patch_weight, needs_bias, needs_qkv, _, _, needs_position = needs
    S, D = patch_weight.shape[:2]
    Q, dtype = offsets_BQ1.shape[1] - 1, patch_weight.dtype

    def empty(shape: Sequence[int], needed: bool) -> Tensor:
        return patch_weight.new_empty(shape if needed else (0,))

    return [
        *(empty(stage.shape, need) for stage, need in zip(stages, needs_stages, strict=True)),
        empty(patch_weight.shape, needs_patch_weight),
        empty((S, D), needs_bias),
        empty(qkv_weight.shape, needs_qkv),
        torch.empty_like(kept[7], dtype=dtype),
        torch.empty_like(kept[8], dtype=dtype),
        empty((Q, D), needs_position),
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    stages, _, patch_weight, _, qkv_weight = inputs[:5]
    offsets, mask = inputs[9], inputs[11]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(patch_weight, qkv_weight, offsets, mask, *output[1:], *stages)
    ctx.options = (*inputs[14:17], inputs[21])


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    wants_stages, targets, *wants = ctx.needs_input_grad[:9]
    nothing = [None] * len(targets)
    if upstream is None:
        return (nothing, nothing, *(None,) * 20)
    wanted = (wants_stages, wants)
    dstages, parameters = _wanted(_gradients, upstream, ctx.saved_tensors, ctx.options, *wanted)
    return (dstages, nothing, *parameters, *(None,) * 13)


def _wanted(
    direction: Callable[..., list[Tensor]],
    upstream: Tensor,
    saved: tuple[Any, ...],
    options: tuple[Any, ...],
    wants_stages: Sequence[bool],
    wants: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """dF of the stages and the gradients of the seven parameters; None where not wanted."""
    patch_weight, qkv_weight, offsets, mask, *rest = saved
    kept, stages = rest[: -len(wants_stages)], rest[-len(wants_stages) :]
    num_heads, patch_size, causal, backend = options
    patch, bias, qkv, head, head_bias, position, stage = wants
    needs = [patch, bias or stage, qkv, head, head_bias, position]
    *dstages, dpatch, dbias, dqkv, dhead, dhead_bias, dposition = direction(
        upstream, kept, stages, patch_weight, qkv_weight, offsets, mask, num_heads, patch_size,
        causal, list(wants_stages), needs, backend,
    )  # fmt: skip
    # the embedding of a stage is added where its bias is
    parameters = (dpatch, dbias, dqkv, dhead, dhead_bias, dposition, dbias)
    return where_wanted(dstages, wants_stages), where_wanted(parameters, wants)


aligned_loss.register_autograd(_backward, setup_context=_keep)


class _Plain(torch.autograd.Function):
    """The same node without the opaque op, whose lists and schema are walked in Python.

    That costs half a millisecond a call, a tenth of the products of the demo's shape.
    """

    @staticmethod
    def forward(ctx: Any, rest: tuple[Any, ...], *tensors: Any) -> Tensor:
        parameters, stages = tensors[:7], tensors[7:]
        targets, offsets, _, mask, *_ = rest
        num_heads, patch_size, causal, backend = *rest[6:9], rest[-1]
        tables, stage_weights, target_norm, needs = rest[1:5], rest[5], rest[9], rest[10:13]
        found = at_once(
            list(stages), targets, parameters, tables, stage_weights, num_heads, patch_size, causal,
            target_norm, needs, True, backend,
        ) or loss_and_kept(list(stages), targets, *parameters, *rest[1:])  # fmt: skip
        loss, *kept = found
        ctx.save_for_backward(parameters[0], parameters[2], offsets, mask, *kept, *stages)
        ctx.options = (num_heads, patch_size, causal, backend)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        _, *wants = ctx.needs_input_grad
        wanted = (wants[7:], wants[:7])
        dstages, parameters = _wanted(gradients, upstream, ctx.saved_tensors, ctx.options, *wanted)
        return (None, *parameters, *dstages)


def joined_loss(
    stages: list[Tensor], targets: list[Tensor], parameters: Sequence[Tensor | None], *rest: Any
) -> Tensor:
    """The loss of `aligned_loss`: through the opaque op wherever somebody looks on."""
    loss: Tensor
    if is_watched((*stages, *targets, *parameters)):
        loss = aligned_loss(stages, targets, *parameters, *rest)[0]
    else:
        loss = _Plain.apply((targets, *rest), *parameters, *stages)  # type: ignore[no-untyped-call]
    return loss
