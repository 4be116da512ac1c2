"""The joined loss for callers inside an opaque op: in one call, or before and after its errors.

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


def at_once(
    stages: list[Tensor],
    targets: list[Tensor],
    parameters: native_impl.Parameters,
    tables: native_impl.Tables,
    stage_weights: list[float],
    num_heads: int,
    patch_size: int,
    causal: bool,
    target_norm: bool,
    needs: Sequence[bool],
    keeps_rows: bool,
    backend: str,
) -> list[Tensor] | None:
    """The loss and all that backward needs, where the backend has such a call.

    What rows are kept with keeps_rows is between the two calls of a backend.
    """
    if IMPLS[backend] is not steps_on_cpu:
        return None
    return native_impl.loss_and_kept(
        stages, targets, parameters, tables, stage_weights, num_heads, patch_size, causal,
        target_norm, needs, keeps_rows,
    )  # fmt: skip


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both tables, v, c [S, B Q], the factor, X, QKV, L, Y."""
    impl, scale = IMPLS[backend], default_scale(patch_weight.shape[1], num_heads)
    embeddings = (patch_embedding, stage_embedding)
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
        patch_size, causal, needs,
    )  # fmt: skip
