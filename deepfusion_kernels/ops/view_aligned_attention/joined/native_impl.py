"""The joined loss in one native call each way, where rows are multiplied in place.

Between library calls lie some twenty microseconds each, cold: as much as the products themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..op import default_scale
from ..patch_rows.native_impl import contiguous, dense_rows, is_direct, multiplies, needed_mask

# W, c, Wqkv, U, u, embeddings of patches and stages
Parameters = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None
]  # fmt: skip
# offsets of both sides, masks of both sides
Tables = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _multiplies_heads(head_weight: Tensor) -> bool:
    """Whether errors are formed here too: bfloat16 goes in pairs along both depths."""
    M, D = head_weight.shape[1:]
    is_paired = head_weight.dtype != torch.bfloat16 or M % 2 == D % 2 == 0
    return is_paired and M > 0 and multiplies(head_weight.dtype)


def loss_and_kept(
    stages: Sequence[Tensor],
    targets: Sequence[Tensor],
    parameters: Parameters,
    tables: Tables,
    stage_weights: Sequence[float],
    num_heads: int,
    patch_size: int,
    causal: bool,
    target_norm: bool,
    needs: Sequence[bool],
    keeps_rows: bool,
) -> list[Tensor] | None:
    """loss, factor, v, X, QKV, L, dY, delta, dU, du; None where the steps are to serve.

    needs: the hidden side, U, u. With keeps_rows two more follow: pooled rows, which backward would
    pool again, and Y. Where Y is not empty, E [S, N, M] is in the place of dU: of few rows both
    are smaller, and dU is written once, by backward.
    """
    patch_weight, head_weight = parameters[0], parameters[3]
    offsets_BQ1, target_offsets, mask_BL, target_mask = tables
    is_shared = target_mask is mask_BL
    mask_BL = needed_mask(mask_BL)
    stages = [dense_rows(stage) for stage in stages]
    if offsets_BQ1.shape[1] < 2 or not is_direct(stages, patch_weight, mask_BL, patch_size):
        return None
    if not _multiplies_heads(head_weight):
        return None
    found: list[Tensor] = torch.ops.deepfusion_native.joined_forward.default(
        stages, [dense_rows(target) for target in targets], *map(contiguous, parameters),
        offsets_BQ1.contiguous(), target_offsets.contiguous(), mask_BL,
        mask_BL if is_shared else needed_mask(target_mask), list(stage_weights), num_heads,
        patch_size, causal, target_norm, default_scale(patch_weight.shape[1], num_heads),
        list(map(int, needs)), keeps_rows,
    )  # fmt: skip
    return found or None


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
) -> list[Tensor] | None:
    """dF of every stage, dW, dc, dWqkv, dU, du, dpos; None where the steps are to serve."""
    mask_BL = needed_mask(mask_BL)
    stages = [dense_rows(stage) for stage in stages]
    if offsets_BQ1.shape[1] < 2 or not is_direct(stages, patch_weight, mask_BL, patch_size):
        return None
    found: list[Tensor] = torch.ops.deepfusion_native.joined_backward.default(
        upstream, [tensor.contiguous() for tensor in kept], stages, patch_weight.contiguous(),
        qkv_weight.contiguous(), offsets_BQ1.contiguous(), mask_BL, num_heads, patch_size, causal,
        default_scale(patch_weight.shape[1], num_heads), list(map(int, needs)),
    )  # fmt: skip
    return found
