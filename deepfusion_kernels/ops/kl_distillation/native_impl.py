"""kl_distillation in C++: torch sends the call to the CPU or the CUDA kernels by device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shared.kl_options import DIVERGENCES
from .options import Options

# m_s, ln l_s, m_t, ln l_t, k_s, k_t, m_1, ln l_1: csrc/common/kl_math.h
SAVED = 8

# compute capabilities whose `make gpu` the CUDA kernels have passed; elsewhere only on request
PROVEN_ON: frozenset[tuple[int, int]] = frozenset()


def declines(name: str, tensor: Tensor, **facts: Any) -> str | None:
    """CUDA serves two- and four-byte floats."""
    if name == "cuda" and torch.float64 in facts.get("dtypes", (tensor.dtype,)):
        return "kl_distillation serves float32, bfloat16 and float16, got float64"
    return None


def _native(options: Options) -> tuple[int, float, float, float, float, float]:
    return (DIVERGENCES.index(options.divergence), *options[1:])


def forward(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    keep: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Row losses [T] and statistics [T, 8] of student [A, B, V_s], teacher [A, B, V_t]."""
    ops = torch.ops.deepfusion_native
    loss, stats = ops.kl_distillation_forward(student, teacher, labels, keep, *_native(options))
    return loss, stats


def backward(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    keep: Tensor | None,
    stats: Tensor,
    options: Options,
    needs_dstudent: bool,
    needs_dteacher: bool,
) -> tuple[Tensor, Tensor]:
    """dloss [T] -> d student, d teacher in their shapes and dtypes; [0] where not wanted."""
    rows, needs = (student, teacher, labels, keep, stats), (needs_dstudent, needs_dteacher)
    ops = torch.ops.deepfusion_native
    dstudent, dteacher = ops.kl_distillation_backward(
        dloss.contiguous(), *rows, *_native(options), *needs
    )
    return dstudent, dteacher
