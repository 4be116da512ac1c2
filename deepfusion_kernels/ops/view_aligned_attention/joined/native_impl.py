"""The joined loss around its errors, one native call each way, where rows are multiplied in place.

Between library calls lie some twenty microseconds each, cold: as much as the products themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..native_impl import contiguous, dense_rows, is_direct, multiplies, needed_mask

Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def attended(
    stages: Sequence[Tensor],
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
    stage_weights: Sequence[float],
    num_heads: int,
    patch_size: int,
    causal: bool,
    scale: float,
) -> Found | None:
    """Both tables, v, c, the factor, X, QKV, L, Y; None where the steps are to serve or refuse."""
    is_shared = target_mask is mask_BL
    mask_BL = needed_mask(mask_BL)
    stages = [dense_rows(stage) for stage in stages]
    if offsets_BQ1.shape[1] < 2 or not is_direct(stages, patch_weight, mask_BL, patch_size):
        return None
    target_mask = mask_BL if is_shared else needed_mask(target_mask)
    offsets_BQ1, target_offsets = offsets_BQ1.contiguous(), target_offsets.contiguous()
    found = torch.ops.deepfusion_native.joined_forward(
        stages, patch_weight.contiguous(), patch_bias.contiguous(), qkv_weight.contiguous(),
        contiguous(patch_embedding), contiguous(stage_embedding), offsets_BQ1, target_offsets,
        mask_BL, target_mask, target_length, width, list(stage_weights), num_heads, patch_size,
        causal, scale,
    )  # fmt: skip
    return (offsets_BQ1, target_offsets, *found) if found else None


def serves(features: Tensor) -> bool:
    """Whether the calls know this dtype on this processor."""
    return features.numel() > 0 and multiplies(features.dtype)


def finished(
    scale_SN: Tensor, sse_SN: Tensor, factor: Tensor, y_SBQD: Tensor, dy: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """The loss, and rowsum(dY * Y) of every head where dY was formed."""
    loss, delta = torch.ops.deepfusion_native.joined_loss(
        scale_SN, sse_SN, factor, y_SBQD, dy, num_heads
    )
    return loss, delta


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
    scale: float,
    needs: Sequence[bool],
) -> list[Tensor] | None:
    """dF of every stage, dW, dc, dWqkv, dU, du, dpos; None where the steps are to serve."""
    mask_BL = needed_mask(mask_BL)
    stages = [dense_rows(stage) for stage in stages]
    if offsets_BQ1.shape[1] < 2 or not is_direct(stages, patch_weight, mask_BL, patch_size):
        return None
    found: list[Tensor] = torch.ops.deepfusion_native.joined_backward(
        upstream, [tensor.contiguous() for tensor in kept], stages, patch_weight.contiguous(),
        qkv_weight.contiguous(), offsets_BQ1.contiguous(), mask_BL, num_heads, patch_size, causal,
        scale, list(map(int, needs)),
    )  # fmt: skip
    return found
