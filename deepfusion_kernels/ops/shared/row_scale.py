"""The weight of each row's loss where an op must know it before the first row."""

from __future__ import annotations

import torch
from torch import Tensor

from .kl_options import Rows


def row_scale(like_TD: Tensor, rows: Rows, reduction: str, wide: torch.dtype) -> Tensor:
    """Row weights [T], over their sum for 'mean'; 0 where masked, even if all rows are."""
    T = like_TD.shape[0]
    scale_T = like_TD.new_ones(T, dtype=wide)
    if rows.weight_T is not None:
        scale_T = rows.weight_T.to(wide).contiguous()
    if rows.keep_T is not None:
        scale_T = torch.where(rows.keep_T, scale_T, 0)
    if reduction == "mean":
        total = scale_T.sum()
        scale_T = torch.where(total > 0, scale_T / total, 0)
    return scale_T
