"""Linear layer and squared error to a pooled target, row by row.

R_n = U y_n + u - G_n            G_n = mean of the target's tokens in patch n, perhaps layer-normed
sse_n = |R_n|^2                  rows of scale 0 are 0 and their target is not looked at
gradients of sum_n c_n sse_n:    E_n = 2 c_n R_n    dy_n = U^T E_n    dU = E^T y    du = sum_n E_n
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shared import patches

NORM_EPS = 1e-6


def forward(
    features_ND: Tensor,
    weight_MD: Tensor,
    bias_M: Tensor | None,
    target_BLM: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    scale_N: Tensor,
    target_norm: bool,
    chunk_rows: int,
    needs_features: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sse [N], dfeatures [N, D], dweight [M, D] and dbias [M]: the last two and sse in float32.

    N = B Q. Float64 in, float64 throughout. A gradient that is not needed is an empty tensor.
    """
    wide = patches.wide_dtype(features_ND.dtype)
    y_ND, weight = features_ND.to(wide), weight_MD.to(wide)
    goal_BQM = patches.pool_mean(target_BLM.to(wide), offsets_BQ1, mask_BL)
    if target_norm:
        goal_BQM = F.layer_norm(goal_BQM, goal_BQM.shape[-1:], eps=NORM_EPS)
    error_NM = y_ND @ weight.t() - goal_BQM.flatten(0, 1)
    if bias_M is not None:
        error_NM = error_NM + bias_M.to(wide)
    error_NM = torch.where(scale_N[:, None] != 0, error_NM, 0)
    derror_NM = 2 * scale_N.to(wide)[:, None] * error_NM
    return (
        error_NM.square().sum(1),
        (derror_NM @ weight).to(features_ND.dtype) if needs_features else features_ND.new_empty(0),
        derror_NM.t() @ y_ND if needs_weight else y_ND.new_empty(0),
        derror_NM.sum(0) if needs_bias else y_ND.new_empty(0),
    )
