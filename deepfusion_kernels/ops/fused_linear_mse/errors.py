"""Errors of rows and the gradients formed with them, by the backend of a call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..shared import patches
from . import native_cuda, native_impl, reference, triton_impl

IMPLS = {
    "reference": reference,
    "cpu": native_impl,
    "cuda": native_cuda,
    "triton": triton_impl,
}


def row_weights(
    offsets_BQ1: Tensor, mask_BL: Tensor | None, weight_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """w [N] in the wide type: 1 or the given weight where the patch holds a valid token, else 0."""
    valid_N = patches.counts(offsets_BQ1, mask_BL).flatten() > 0
    wide = patches.wide_dtype(dtype)
    return valid_N.to(wide) if weight_N is None else torch.where(valid_N, weight_N.to(wide), 0)


def errors(
    features_ND: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_BLM: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    scale_N: Tensor,
    target_norm: bool,
    chunk_rows: int,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """|R_n|^2 and the gradients of sum_n scale_n |R_n|^2; for callers inside an opaque op."""
    result: tuple[Tensor, Tensor, Tensor, Tensor] = IMPLS[backend].forward(
        features_ND, weight, bias, target_BLM, offsets_BQ1, mask_BL, scale_N, target_norm,
        chunk_rows, *needs,
    )  # fmt: skip
    return result
