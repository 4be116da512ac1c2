"""Projection, attention and loss under one autograd node.

    X = patches W + c      Q, K, V = X Wqkv      Y = attention
loss = sum_j s_j sum_n v_n |U_j Y_jn + u_j - G_jn|^2 / (M sum v)

The loss comes last and is a scalar: dY, dU and du are formed with it. The attention then needs
delta = rowsum(dY * Y) only, so X, QKV, L, dY and delta are kept, and Y is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.fused_linear_mse import op as mse
from ..ops.fused_linear_mse.stages import stage_errors
from ..ops.shared import patches
from ..ops.shared.gradients import scaled
from ..ops.view_aligned_attention import op as attention
from ..ops.view_aligned_attention.projection import shift_gradients
from .alignment_arguments import checked_patches


@torch.library.custom_op("deepfusion::view_aligned_attention", mutates_args=())
def aligned_loss(
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
    """loss, then 1 / (M sum v), v, X, QKV, L, dY, delta, dU, du; what is not needed is empty."""
    impl = attention.IMPLS[backend]
    _S, M, D = head_weight.shape
    cuts, target_cuts, valid_BQ = checked_patches(
        offsets_BQ1, target_offsets, mask_BL, target_mask, stages[0].shape[1], targets[0].shape[1]
    )
    x = impl.project_forward(
        stages, patch_weight, patch_bias, cuts, mask_BL, patch_embedding, stage_embedding,
        patch_size,
    )  # fmt: skip
    scale = attention.default_scale(D, num_heads)
    y, qkv, lse = impl.attention_forward(x, qkv_weight, None, valid_BQ, num_heads, causal, scale)
    weight_N = valid_BQ.flatten().to(lse.dtype)
    needs = (needs_hidden, needs_head, needs_head_bias)
    # not a tensor of the weights: its copy to a device would be waited for
    scale_SN = torch.stack([weight_N * weight for weight in stage_weights])
    sse_SN, dy, dhead, dhead_bias = stage_errors(
        y.flatten(1, 2), head_weight, head_bias, targets, target_cuts, target_mask, scale_SN,
        target_norm, needs, backend,
    )  # fmt: skip
    total = torch.dot(scale_SN.flatten(), sse_SN.flatten())
    factor = mse.mean_factor(weight_N.sum(), M)
    if not needs_hidden:
        nothing = [lse.new_empty(0) for _ in range(5)]
        return total * factor, factor, valid_BQ, *nothing, dhead, dhead_bias
    dy = dy.view_as(y)
    delta = attention.row_delta(y, dy, num_heads)
    return total * factor, factor, valid_BQ, x, qkv, lse, dy, delta, dhead, dhead_bias


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


@torch.library.custom_op("deepfusion::view_aligned_attention_backward", mutates_args=())
def _gradients(
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
    """dF of every stage, then what `needs` names: dW, dc, dWqkv, dU, du, dpos."""
    factor, valid_BQ, x, qkv, lse, dy, delta, dhead, dhead_bias = kept
    needs_patch_weight, needs_bias, needs_qkv, _, _, needs_position = needs
    impl, dtype = attention.IMPLS[backend], patch_weight.dtype
    g = upstream * factor
    heads = [scaled(dhead, g, dtype), scaled(dhead_bias, g, dtype)]
    if not (any(needs_stages) or needs_patch_weight or needs_bias or needs_qkv or needs_position):
        *nothing, last = [x.new_empty(0, dtype=dtype) for _ in range(len(stages) + 4)]
        return [*nothing, *heads, last]
    D = patch_weight.shape[1]
    dqkv = impl.attention_backward(
        qkv, lse, dy, delta, valid_BQ, num_heads, causal,
        attention.default_scale(D, num_heads), g,
    )  # fmt: skip
    needs_x = any(needs_stages) or needs_patch_weight or needs_bias or needs_position
    dx, dqkv_weight = attention.projection_backward(dqkv, x, qkv_weight, needs_x, needs_qkv)
    del dqkv
    cuts = offsets_BQ1
    if not cuts.is_cpu:
        cuts = patches.checked_offsets(cuts, stages[0].shape[1], "", "")
    if needs_x:
        dstages, dpatch_weight = impl.project_backward(
            stages, patch_weight, dx, cuts, mask_BL, patch_size, needs_stages, needs_patch_weight
        )
    else:
        *dstages, dpatch_weight = [x.new_empty(0) for _ in range(len(stages) + 1)]
    dbias, dposition = shift_gradients(dx, needs_bias, needs_position)
    return [*dstages, dpatch_weight, dbias, dqkv_weight, *heads, dposition]


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
    wants_stages, _, *wants = ctx.needs_input_grad[:9]
    if upstream is None:
        nothing = [None] * len(wants_stages)
        return (nothing, nothing, *(None,) * 20)
    patch_weight, qkv_weight, offsets, mask, *rest = ctx.saved_tensors
    kept, stages = rest[:9], rest[9:]
    num_heads, patch_size, causal, backend = ctx.options
    patch, bias, qkv, head, head_bias, position, stage = wants
    needs = [patch, bias or stage, qkv, head, head_bias, position]
    gradients = _gradients(
        upstream, kept, stages, patch_weight, qkv_weight, offsets, mask, num_heads, patch_size,
        causal, list(wants_stages), needs, backend,
    )  # fmt: skip
    *dstages, dpatch, dbias, dqkv, dhead, dhead_bias, dposition = gradients
    # the embedding of a stage is added where its bias is
    parameters = (dpatch, dbias, dqkv, dhead, dhead_bias, dposition, dbias)
    return (
        [g if want else None for g, want in zip(dstages, wants_stages, strict=True)],
        [None] * len(stages),
        *(g if want else None for g, want in zip(parameters, wants, strict=True)),
        *(None,) * 13,
    )


aligned_loss.register_autograd(_backward, setup_context=_keep)
