"""Which rows of the joined loss count, and what they are scaled by.

v_bi = both sides hold a valid token in patch i      c_jn = s_j v_n      factor = 1 / (M sum v)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..shared import patches
from . import native_impl
from .op import IMPLS


def checked_patches(
    student_offsets: Tensor,
    teacher_offsets: Tensor,
    student_mask: Tensor | None,
    teacher_mask: Tensor | None,
    student_length: int,
    teacher_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both tables, checked, and which patches hold a valid token on both sides, [B, Q] bool."""
    op = "view_aligned_attention"
    student = patches.checked_offsets(student_offsets, student_length, op, "student_offsets")
    valid = patches.counts(student, student_mask) > 0
    if teacher_offsets is student_offsets and teacher_length == student_length:
        if teacher_mask is not student_mask:
            valid &= patches.counts(student, teacher_mask) > 0
        return student, student, valid
    teacher = patches.checked_offsets(teacher_offsets, teacher_length, op, "teacher_offsets")
    return student, teacher, valid & (patches.counts(teacher, teacher_mask) > 0)


def loss_rows(
    student_offsets: Tensor,
    teacher_offsets: Tensor,
    student_mask: Tensor | None,
    teacher_mask: Tensor | None,
    student_length: int,
    teacher_length: int,
    width: int,
    stage_weights: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both tables, v [B, Q] bool, c [S, B Q] and the factor; ValueError on the CPU for bad tables.

    The native pass finds what the formula finds, and leaves the words of a refusal to it.
    """
    tables = (student_offsets, teacher_offsets, student_mask, teacher_mask)
    lengths = (student_length, teacher_length)
    if IMPLS[backend] is native_impl:
        found = native_impl.loss_rows(*tables, *lengths, width, stage_weights, dtype)
        if found is not None:
            return found
    cuts, target_cuts, valid_BQ = checked_patches(*tables, *lengths)
    weight_N = valid_BQ.flatten().to(dtype)
    # not a tensor of the weights: its copy to a device would be waited for
    scale_SN = torch.stack([weight_N * weight for weight in stage_weights])
    count = weight_N.sum()
    factor = torch.where(count > 0, 1 / (width * count.clamp(min=1)), 0)
    return cuts, target_cuts, valid_BQ, scale_SN, factor
