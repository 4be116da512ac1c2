"""Linear layer and mean squared error to a target, without the predictions in memory.

    R_n = U y_n + u - G_n        loss = sum_n w_n |R_n|^2 / (M sum_n w_n)

The gradients are formed in the forward pass, where R is at hand; backward scales them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from ...checks import expect, expect_option, expect_that
from ..shared.gradients import wants
from .arguments import OP, check, check_patches, even_offsets
from .errors import IMPLS as IMPLS
from .loss import loss_of_rows
from .rows import squared_errors

DOORS = ("fused_linear_mse",)


def fused_linear_mse(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    row_weight: Tensor | None = None,
    target_norm: bool = False,
    patch_size: int | None = None,
    target_offsets: Tensor | None = None,
    target_mask: Tensor | None = None,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean squared error of a linear layer's output, never materialised.

        'mean': sum_n w_n |U y_n + u - g_n|^2 / (M sum_n w_n)    'sum': sum_n w_n |.|^2
        'none': w_n |.|^2 / M, one a row

    features [..., D], weight [M, D], bias [M] or None, target [..., M], row_weight [...] -> float32
    (float64 for float64). With patch_size or target_offsets [B, Q+1] int32 the features are
    [B, Q, D], the target [B, L, M] tokens, and g the mean of a patch's tokens where target_mask
    [B, L] is set; a patch without any has weight 0. Rows of weight 0 are never read. target_norm
    layer-normalises g. Target and row weights take no gradient. Raises ValueError for shapes,
    dtypes, devices, options. Source: arXiv 2602.14301, eq. 9.
    """
    expect_option(reduction, OP, "reduction", ("mean", "sum", "none"))
    M, D = expect(weight, OP, "weight", "M D")
    pooled = patch_size is not None or target_offsets is not None
    rows = check(features, weight, bias, target, row_weight, chunk_rows, pooled)
    if pooled:
        target_BLM, mask_BL = target, target_mask
        offsets = check_patches(rows, target, patch_size, target_offsets, target_mask)
    else:
        expect_that(
            target_mask is None, OP, "target_mask", "None for rows; use row_weight", "a tensor"
        )
        target_BLM, mask_BL = target.reshape(1, -1, M), None
        offsets = even_offsets(target_BLM, 1)
    inputs = (
        features.reshape(-1, D),
        weight,
        bias,
        target_BLM,
        offsets,
        mask_BL,
        None if row_weight is None else row_weight.reshape(-1),
    )
    options = (target_norm, chunk_rows or 0)
    chosen = backends.choose(backend, features, IMPLS)
    if reduction == "none":
        sse_N, weights_N = squared_errors(*inputs, *options, chosen)
        return torch.mul(sse_N, weights_N / M).reshape(rows)
    needs = wants(features, weight, bias)
    return loss_of_rows(*inputs, reduction == "mean", *options, *needs, chosen)
