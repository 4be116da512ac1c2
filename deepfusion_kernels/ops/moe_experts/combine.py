"""The weighted sum of a token's rows, for backends whose products are a library's."""

from __future__ import annotations

import torch
from torch import Tensor


def combine(rows: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
    """Each token's rows, weighted if weights are given, summed in float32, k ascending.

    rows [R, D], slots [T, K], weights [T, K] -> [T, D].
    """
    total_TD = torch.zeros(slots.shape[0], rows.shape[1], dtype=torch.float32, device=rows.device)
    for k in range(slots.shape[1]):
        y_TD = rows[slots[:, k].clamp(min=0)].float()
        y_TD = y_TD if weights is None else y_TD * weights[:, k, None].float()
        # where, not a zero weight: rows past the last expert's hold anything
        total_TD += torch.where(slots[:, k, None] >= 0, y_TD, 0)
    return total_TD.to(rows.dtype)
