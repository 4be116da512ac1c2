"""The rows in C++: one sweep of the vocabulary a direction, the kept ids beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shared.kl_options import DIVERGENCES
from .problem import FLOOR, TAILS, Problem

STATISTICS = 6


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Rows [T] times their scale, and what backward needs of each, [T, 6]."""
    rows_T, statistics = torch.ops.deepfusion_native.topk_kl_forward(*_arguments(problem))
    return rows_T, statistics


def backward(problem: Problem, drows_T: Tensor, statistics: Tensor) -> Tensor:
    """Gradient [A, B, V] in the logits' dtype."""
    dstudent_ABV: Tensor = torch.ops.deepfusion_native.topk_kl_backward(
        drows_T.contiguous(), statistics, *_arguments(problem)
    )
    return dstudent_ABV


def select(logits_TV: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [T, k] of the largest logits of each row, largest first."""
    ids_TK, logprobs_TK = torch.ops.deepfusion_native.topk_logprobs(logits_TV[None], k, temperature)
    return ids_TK, logprobs_TK


def _arguments(problem: Problem) -> tuple[Any, ...]:
    student, ids, logprobs, labels = problem[:4]
    if student.stride(-1) != 1 and student.shape[-1] > 1:
        student = student.contiguous()
    labels = None if labels is None else labels.long().contiguous()
    modes = TAILS.index(problem.tail), DIVERGENCES.index(problem.divergence)
    kept = ids.long().contiguous(), logprobs.to(torch.float64).contiguous()
    return student, *kept, labels, problem.scale_T, *modes, *problem[7:], FLOOR
