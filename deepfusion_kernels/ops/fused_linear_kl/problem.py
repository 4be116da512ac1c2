"""What one call of the fused linear distillation loss consists of, once its door has checked it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Tokens are flattened; scale_T is the row weight times 1/n, and 0 marks a masked row.

    kd_scale = kd_weight kappa holds the tau^2 of `scale_by_temperature_squared`.
    """

    student_hidden: Tensor  # [T, D_s]
    student_weight: Tensor  # [V_s, D_s]
    student_bias: Tensor | None  # [V_s]
    teacher_hidden: Tensor | None  # [T, D_t]
    teacher_weight: Tensor | None  # [V_t, D_t]
    teacher_bias: Tensor | None  # [V_t]
    labels: Tensor | None  # [T]
    scale_T: Tensor
    divergence: str
    beta: float
    temperature: float
    kd_scale: float
    ce_weight: float
    chunk_bytes: int

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and losses."""
        sides = (self.student_hidden, self.teacher_hidden)
        doubles = any(side is not None and side.dtype == torch.float64 for side in sides)
        return torch.float64 if doubles else torch.float32

    @property
    def compared(self) -> int:
        """Columns that the divergence compares: those both heads have, none without a teacher."""
        if self.teacher_weight is None:
            return 0
        return min(self.student_weight.shape[0], self.teacher_weight.shape[0])

    @property
    def columns(self) -> int:
        """Student columns that any term of the loss reads."""
        return self.student_weight.shape[0] if self.ce_weight else self.compared

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Dtypes of the three gradients."""
        bias = self.wide if self.student_bias is None else self.student_bias.dtype
        return self.student_hidden.dtype, self.student_weight.dtype, bias


class Wants(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients in the dtypes of their inputs; one that nobody asked for has no elements."""

    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor
