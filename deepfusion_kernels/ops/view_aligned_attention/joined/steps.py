"""Before and after the errors of the joined loss, for callers inside an opaque op.

X = patches W + c      Q, K, V = X Wqkv      Y = attention      loss = factor sum_jn c_jn |R_jn|^2
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...shared import patches
from .. import native_impl as steps_on_cpu
from ..loss_rows import loss_rows
from ..op import IMPLS, default_scale, row_delta
from . import native_impl


def attended(
    stages: list[Tensor],
    patch_weight: Tensor,
    patch_bias: Tensor,
    qkv_weight: Tensor,
    patch_embedding: Tensor | None,
    stage_embedding: Tensor | None,
    offsets_BQ1: Tensor,
    target_offsets: Tensor,
    mask_BL: Tensor | None,
    target_mask: Tensor | None,
    target_length: int,
    width: int,
    stage_weights: list[float],
    num_heads: int,
    patch_size: int,
    causal: bool,
    backend: str,
) -> native_impl.Found:
    """Both tables, v, c [S, B Q], the factor, X, QKV, L, Y."""
    impl, scale = IMPLS[backend], default_scale(patch_weight.shape[1], num_heads)
    embeddings = (patch_embedding, stage_embedding)
    if impl is steps_on_cpu:
        found = native_impl.attended(
            stages, patch_weight, patch_bias, qkv_weight, *embeddings, offsets_BQ1, target_offsets,
            mask_BL, target_mask, target_length, width, stage_weights, num_heads, patch_size,
            causal, scale,
        )  # fmt: skip
        if found is not None:
            return found
    cuts, target_cuts, valid_BQ, scale_SN, factor = loss_rows(
        offsets_BQ1, target_offsets, mask_BL, target_mask, stages[0].shape[1], target_length,
        width, stage_weights, patches.wide_dtype(patch_weight.dtype), backend,
    )  # fmt: skip
    x = impl.project_forward(
        stages, patch_weight, patch_bias, cuts, mask_BL, *embeddings, patch_size
    )
    y, qkv, lse = impl.attention_forward(x, qkv_weight, None, valid_BQ, num_heads, causal, scale)
    return cuts, target_cuts, valid_BQ, scale_SN, factor, x, qkv, lse, y


def finished(
    scale_SN: Tensor,
    sse_SN: Tensor,
    factor: Tensor,
    y_SBQD: Tensor,
    dy: Tensor,
    num_heads: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and delta = rowsum(dY * Y) of every head; dY may be empty, and delta is then."""
    if IMPLS[backend] is steps_on_cpu and native_impl.serves(y_SBQD):
        return native_impl.finished(scale_SN, sse_SN, factor, y_SBQD, dy, num_heads)
    loss = torch.dot(scale_SN.flatten(), sse_SN.flatten()) * factor
    if dy.numel() != y_SBQD.numel():
        return loss, scale_SN.new_empty(0)
    return loss, row_delta(y_SBQD, dy.view_as(y_SBQD), num_heads, backend)


def gradients(
    upstream: Tensor,
    kept: Sequence[Tensor],
    stages: Sequence[Tensor],
    patch_weight: Tensor,
    qkv_weight: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    num_heads: int,
    patch_size: int,
    causal: bool,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor] | None:
    """All gradients at once, where the backend has such a call."""
    if IMPLS[backend] is not steps_on_cpu:
        return None
    return native_impl.gradients(
        upstream, kept, stages, patch_weight, qkv_weight, offsets_BQ1, mask_BL, num_heads,
        patch_size, causal, default_scale(patch_weight.shape[1], num_heads), needs,
    )  # fmt: skip
