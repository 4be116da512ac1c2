"""Attention head by head, with its products in one C++ call where it multiplies the dtype, else
library GEMMs beside C++ passes; the projection is in patch_rows/."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..shared import patches
from ..shared.gemm import product
from .patch_rows.native_impl import contiguous, dense_rows, multiplies
from .patch_rows.native_impl import project_backward as project_backward
from .patch_rows.native_impl import project_forward as project_forward


def _multiplies_features(features_SBQD: Tensor) -> bool:
    """Whether the products on either side of the attention lie in its own call."""
    # bfloat16 is multiplied in pairs along the depth
    is_paired = features_SBQD.dtype != torch.bfloat16 or features_SBQD.shape[3] % 2 == 0
    return is_paired and features_SBQD.numel() > 0 and multiplies(features_SBQD.dtype)


def attention_forward(
    features_SBQD: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    valid_BQ: Tensor | None,
    num_heads: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.attention_forward: scores live in one tile of 64 x 64 per thread."""
    if _multiplies_features(features_SBQD):
        y, qkv, lse_BHP = torch.ops.deepfusion_native.attention_forward.default(
            dense_rows(features_SBQD), qkv_weight.contiguous(), contiguous(qkv_bias),
            contiguous(valid_BQ), num_heads, causal, scale,
        )  # fmt: skip
        return y, qkv, lse_BHP
    S, B, Q, D = features_SBQD.shape
    qkv = features_SBQD.new_empty(S, B, Q, 3 * D)
    product(features_SBQD.reshape(S * B * Q, D), qkv_weight.t(), qkv.view(S * B * Q, 3 * D))
    if qkv_bias is not None:
        qkv += qkv_bias
    y = features_SBQD.new_empty(S, B, Q, D)
    lse_BHP = y.new_empty(B, num_heads, S * Q, dtype=patches.wide_dtype(y.dtype))
    valid_BQ = None if valid_BQ is None else valid_BQ.contiguous()
    torch.ops.deepfusion_native.stage_attention_forward(
        qkv, valid_BQ, num_heads, causal, scale, y, lse_BHP
    )
    return y, qkv, lse_BHP


def attention_backward(
    qkv: Tensor,
    lse_BHP: Tensor,
    dy_SBQD: Tensor,
    delta_BHP: Tensor,
    valid_BQ: Tensor | None,
    num_heads: int,
    causal: bool,
    scale: float,
    upstream: Tensor,
) -> Tensor:
    """As reference.attention_backward."""
    dqkv = torch.empty_like(qkv)
    valid_BQ = None if valid_BQ is None else valid_BQ.contiguous()
    torch.ops.deepfusion_native.stage_attention_backward(
        qkv, lse_BHP, dy_SBQD.contiguous(), delta_BHP.contiguous(), valid_BQ, num_heads, causal,
        scale, upstream.to(lse_BHP.dtype), dqkv,
    )  # fmt: skip
    return dqkv


def attention_gradients(
    dy_SBQD: Tensor,
    y_SBQD: Tensor,
    features_SBQD: Tensor,
    qkv_weight: Tensor,
    qkv: Tensor,
    lse_BHP: Tensor,
    valid_BQ: Tensor | None,
    num_heads: int,
    causal: bool,
    scale: float,
    needs_features: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """dX, dWqkv, dbqkv in one call; None where the steps are to serve."""
    if not _multiplies_features(features_SBQD):
        return None
    dx, dweight, dbias = torch.ops.deepfusion_native.attention_backward.default(
        dy_SBQD.contiguous(), y_SBQD.contiguous(), dense_rows(features_SBQD),
        qkv_weight.contiguous(), qkv, lse_BHP, contiguous(valid_BQ), num_heads, causal, scale,
        needs_features, needs_weight, needs_bias,
    )  # fmt: skip
    return dx, dweight, dbias


def row_delta(y_SBQD: Tensor, dy_SBQD: Tensor, num_heads: int) -> Tensor:
    """rowsum(dY * Y) of every head, [B, H, P]."""
    S, B, Q, _ = y_SBQD.shape
    delta = y_SBQD.new_empty(B, num_heads, S * Q, dtype=patches.wide_dtype(y_SBQD.dtype))
    torch.ops.deepfusion_native.stage_attention_delta(
        y_SBQD.contiguous(), dy_SBQD.contiguous(), num_heads, delta
    )
    return delta


def loss_rows(
    offsets_BQ1: Tensor,
    target_offsets: Tensor,
    mask_BL: Tensor | None,
    target_mask: Tensor | None,
    length: int,
    target_length: int,
    width: int,
    stage_weights: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Both tables, v, c and the factor; None where a table must be refused."""
    is_shared = target_offsets is offsets_BQ1
    offsets_BQ1 = offsets_BQ1.contiguous()
    target_offsets = offsets_BQ1 if is_shared else target_offsets.contiguous()
    (B, cuts), S = offsets_BQ1.shape, len(stage_weights)
    valid = offsets_BQ1.new_empty(B, cuts - 1, dtype=torch.bool)
    scale = offsets_BQ1.new_empty(S, B * (cuts - 1), dtype=dtype)
    factor = offsets_BQ1.new_empty((), dtype=dtype)
    masks = [None if mask is None else mask.ne(0).contiguous() for mask in (mask_BL, target_mask)]
    fits = torch.ops.deepfusion_native.loss_rows(
        offsets_BQ1, target_offsets, *masks, length, target_length, width, list(stage_weights),
        valid, scale, factor,
    )  # fmt: skip
    return (offsets_BQ1, target_offsets, valid, scale, factor) if fits else None
