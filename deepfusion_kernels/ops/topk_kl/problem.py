"""What one call of the top-k distillation loss consists of, once its door has checked it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# a share of the mass outside the kept tokens is at least this: a teacher cut at K = V stays finite
FLOOR = 2.0**-24
TAILS = ("bucket", "zero", "renormalize")


class Problem(NamedTuple):
    """Tokens stand in two dimensions, so that logits[:, :-1] needs no copy; T = A * B.

    scale_T is the row weight times 1/n, and 0 marks a masked row; kd_scale = kd_weight kappa.
    """

    student_ABV: Tensor
    ids_TK: Tensor
    logprobs_TK: Tensor
    labels: Tensor | None  # [T]
    scale_T: Tensor
    tail: str
    divergence: str
    beta: float
    temperature: float
    kd_scale: float
    ce_weight: float

    @property
    def wide(self) -> torch.dtype:
        """The dtype of losses."""
        return torch.float64 if self.student_ABV.dtype == torch.float64 else torch.float32
