"""kl_distillation in Triton: launches of the row kernels.

forward : one sweep for the sums (jsd a second one for K_s, K_t), 8 statistics a row
backward: one sweep, reads both logits and the statistics, writes each wanted gradient once
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._triton import triton
from ..shared.kl_options import DIVERGENCES
from .options import Options
from .triton_rows import _kl_backward_kernel, _kl_forward_kernel

# m_s, ln l_s, m_t, ln l_t, k_s, k_t, m_1, ln l_1: the order of csrc/common/kl_math.h
SAVED = 8

# columns by divergence, not measured here: what compiles without spills for all four targets. Two
# blocks of 8 warps fit a multiprocessor; left to itself ptxas aims at more of them and spills jsd.
BLOCK_V = (4096, 4096, 2048)
CAPPED_BLOCK_V = 2048
LAUNCH = {"num_warps": 8, "maxnreg": 128}


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
    shared_sum = options.temperature == 1.0 and V_s == V_kd
    with torch.cuda.device_of(student):
        _kl_forward_kernel[(T,)](
            _side(student),
            None if teacher is None else _side(teacher),
            labels,
            keep,
            loss,
            stats,
            (V_s, V_kd),
            (
                options.beta,
                1 / options.temperature,
                options.kd_scale,
                options.ce_weight,
                options.softcap,
            ),
            DIVERGENCE=divergence,
            CAPPED=options.softcap != 0.0,
            OWN_SUM=labels is not None and not shared_sum,
            BLOCK_V=_block(V_s, divergence, options),
            **LAUNCH,
        )
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
    like = student if teacher is None else teacher
    dstudent = student.new_empty(student.shape if needs_dstudent else 0)
    dteacher = like.new_empty(like.shape if needs_dteacher else 0)
    T, V_s = student.shape[0] * student.shape[1], student.shape[2]
    V_t = 0 if teacher is None else teacher.shape[2]
    if T == 0:
        return dstudent, dteacher
    divergence = DIVERGENCES.index(options.divergence)
    kd_scale = options.kd_scale / options.temperature
    with torch.cuda.device_of(student):
        _kl_backward_kernel[(T,)](
            dloss.contiguous(),
            _side(student),
            None if teacher is None else _side(teacher),
            labels,
            keep,
            stats,
            dstudent if needs_dstudent else None,
            dteacher if needs_dteacher else None,
            (V_s, V_t, min(V_s, V_t)),
            (
                options.beta,
                1 / options.temperature,
                kd_scale,
                options.ce_weight,
                options.softcap,
            ),
            DIVERGENCE=divergence,
            CAPPED=options.softcap != 0.0,
            BLOCK_V=_block(max(V_s, V_t), divergence, options),
            **LAUNCH,
        )
    return dstudent, dteacher
