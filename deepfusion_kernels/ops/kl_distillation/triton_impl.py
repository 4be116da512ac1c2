"""kl_distillation in Triton: launches of the row kernels.

forward : one sweep for the sums (jsd a second one for K_s, K_t), 8 statistics a row
backward: one sweep, reads both logits and the statistics, writes each wanted gradient once
Fewer rows than twice the multiprocessors: several programs a row, each on a part of its columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._triton import triton
from ..shared.kl_options import DIVERGENCES
from .options import Options
from .triton_rows import _kl_backward_kernel, _kl_forward_kernel
from .triton_split import (
    _jsd_merge_kernel,
    _jsd_partial_kernel,
    _kl_merge_kernel,
    _kl_partial_kernel,
)

# m_s, ln l_s, m_t, ln l_t, k_s, k_t, m_1, ln l_1: the order of csrc/common/kl_math.h
SAVED = 8

# columns by divergence, not measured here: what compiles without spills for all four targets. Two
# blocks of 8 warps fit a multiprocessor; left to itself ptxas aims at more of them and spills jsd.
BLOCK_V = (4096, 4096, 2048)
CAPPED_BLOCK_V = 2048
LAUNCH = {"num_warps": 8, "maxnreg": 128}
MERGE_LAUNCH = {"num_warps": 1, "maxnreg": 128}


def declines(name: str, tensor: Tensor, **facts: Any) -> str | None:
    """Triton serves two- and four-byte floats."""
    if torch.float64 in facts.get("dtypes", (tensor.dtype,)):
        return "kl_distillation serves float32, bfloat16 and float16, got float64"
    return None


def _side(logits: Tensor) -> tuple[Tensor, int, int, int]:
    return logits, logits.shape[1], logits.stride(0), logits.stride(1)


def _block(V: int, divergence: int, options: Options) -> int:
    block = CAPPED_BLOCK_V if options.softcap else BLOCK_V[divergence]
    return int(min(block, max(16, triton.next_power_of_2(V))))


def multiprocessors(tensor: Tensor) -> int:
    """Of the tensor's GPU; 0 under the interpreter, where nothing is gained by splitting a row."""
    if not tensor.is_cuda:
        return 0
    return int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)


def split(T: int, V: int, block: int, processors: int) -> tuple[int, int]:
    """Programs a row, so that all have at least two a multiprocessor, and columns of each."""
    blocks = triton.cdiv(V, block)
    segments = min(blocks, max(1, triton.cdiv(2 * processors, T)))
    span = triton.cdiv(blocks, segments) * block
    return triton.cdiv(V, span), span


def forward(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    keep: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Row losses [T] and statistics [T, 8] of student [A, B, V_s], teacher [A, B, V_t]."""
    T, V_s = student.shape[0] * student.shape[1], student.shape[2]
    V_kd = 0 if teacher is None else min(V_s, teacher.shape[2])
    loss, stats = (
        student.new_empty(T, dtype=torch.float32),
        student.new_empty(T, 8, dtype=torch.float32),
    )
    if T == 0:
        return loss, stats
    divergence = DIVERGENCES.index(options.divergence)
    sides = _side(student), None if teacher is None else _side(teacher)
    scalars = (
        options.beta,
        1 / options.temperature,
        options.kd_scale,
        options.ce_weight,
        options.softcap,
    )
    how: dict[str, Any] = {
        "DIVERGENCE": divergence,
        "CAPPED": options.softcap != 0.0,
        "OWN_SUM": labels is not None and not (options.temperature == 1.0 and V_s == V_kd),
        "BLOCK_V": _block(V_s, divergence, options),
    }
    segments, span = split(T, V_s, how["BLOCK_V"], multiprocessors(student))
    with torch.cuda.device_of(student):
        if segments == 1:
            _kl_forward_kernel[(T,)](
                *sides, labels, keep, loss, stats, (V_s, V_kd), scalars, **how, **LAUNCH
            )
        else:
            _forward_in_parts(sides, labels, keep, loss, stats, (V_s, V_kd), span, scalars, how)
    return loss, stats


def _forward_in_parts(
    sides: tuple[Any, Any],
    labels: Tensor | None,
    keep: Tensor | None,
    loss: Tensor,
    stats: Tensor,
    columns: tuple[int, int],
    span: int,
    scalars: tuple[float, ...],
    how: dict[str, Any],
) -> None:
    T, segments = loss.shape[0], triton.cdiv(columns[0], span)
    part = loss.new_empty(T, segments, SAVED)
    _kl_partial_kernel[(T, segments)](*sides, keep, part, columns, span, scalars, **how, **LAUNCH)
    with_kd, capped = sides[1] is not None, how["CAPPED"]
    _kl_merge_kernel[(T,)](
        *(sides[0], labels, keep, part, loss, stats, columns[0], segments, scalars),
        WITH_KD=with_kd, DIVERGENCE=how["DIVERGENCE"], CAPPED=capped, **MERGE_LAUNCH,
    )  # fmt: skip
    if with_kd and how["DIVERGENCE"] == DIVERGENCES.index("jsd"):
        _jsd_partial_kernel[(T, segments)](
            *sides, keep, part, stats, columns[1], span, scalars,
            CAPPED=capped, BLOCK_V=how["BLOCK_V"], **LAUNCH,
        )  # fmt: skip
        _jsd_merge_kernel[(T,)](keep, part, loss, stats, segments, scalars, **MERGE_LAUNCH)


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
    like = student if teacher is None else teacher
    dstudent = student.new_empty(student.shape if needs_dstudent else 0)
    dteacher = like.new_empty(like.shape if needs_dteacher else 0)
    T, V_s = student.shape[0] * student.shape[1], student.shape[2]
    V_t = 0 if teacher is None else teacher.shape[2]
    if T == 0:
        return dstudent, dteacher
    divergence = DIVERGENCES.index(options.divergence)
    kd_scale = options.kd_scale / options.temperature
    V, block = max(V_s, V_t), _block(max(V_s, V_t), divergence, options)
    segments, span = split(T, V, block, multiprocessors(student))
    with torch.cuda.device_of(student):
        _kl_backward_kernel[(T, segments)](
            dloss.contiguous(),
            _side(student),
            None if teacher is None else _side(teacher),
            labels,
            keep,
            stats,
            dstudent if needs_dstudent else None,
            dteacher if needs_dteacher else None,
            (V_s, V_t, min(V_s, V_t), span),
            (
                options.beta,
                1 / options.temperature,
                kd_scale,
                options.ce_weight,
                options.softcap,
            ),
            DIVERGENCE=divergence,
            CAPPED=options.softcap != 0.0,
            BLOCK_V=block,
            **LAUNCH,
        )
    return dstudent, dteacher
