"""Knowledge distillation of logits against a dense teacher.

x = s / tau, y = t / tau, q = softmax(x), p = softmax(y)
forward_kl = sum_v p (ln p - ln q)    reverse_kl = sum_v q (ln q - ln p)
jsd        = beta KL(p | m) + (1 - beta) KL(q | m),  m = beta p + (1 - beta) q
softcap b: s and t stand for b tanh(s / b) and b tanh(t / b)
row_t      = kd_weight kappa KD_t + ce_weight CE_t,  CE_t = logsumexp(s_t) - s_t[label_t]
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...checks import expect, expect_option, expect_that
from ..shared.kl_options import (
    REDUCTIONS,
    VOCAB_ALIGNS,
    check_rows,
    kl_options,
    reduce_rows,
    refuse_bad_labels,
    wide_dtype,
)
from . import native_impl, reference, triton_impl
from .options import Options

OP = "kl_distillation"
DOORS = ("kl_distillation",)
IMPLS = {"reference": reference, "cpu": native_impl, "cuda": native_impl, "triton": triton_impl}


def kl_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    vocab_align: str = "error",
    softcap: float | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Divergence between teacher and student over the vocabulary, optionally mixed with CE.

    student_logits [..., V_s], teacher_logits [..., V_t]: bfloat16, float16, float32 (float64: cpu
    and reference), last stride 1 or one copy is made. labels [...] int64 or int32 mark masked rows
    and name CE's targets; row_weight [...] >= 0. Returns float32 (float64 for float64): a scalar,
    or [...] for reduction='none'. A teacher that requires a gradient gets it; kd_weight = 0 never
    reads the teacher. softcap b puts b tanh(s / b) in place of both sides' logits. Formulas,
    gradients and every edge: docs/ops/kl_distillation.md.

    Raises ValueError for shapes, dtypes, devices, options and, on the CPU, labels out of range;
    NotImplementedError where the backend asked for cannot serve.
    """
    options = kl_options(
        OP, divergence, beta, temperature, scale_by_temperature_squared, kd_weight, ce_weight
    )
    expect_option(reduction, OP, "reduction", REDUCTIONS)
    is_cap = softcap is None or 0.0 < softcap < math.inf
    expect_that(is_cap, OP, "softcap", "None, or finite and > 0", softcap)
    student = _check_logits(student_logits, "student_logits")
    rows = check_rows(OP, student_logits, labels, row_weight, ignore_index, ce_weight)
    teacher = (
        _check_teacher(student_logits, teacher_logits, vocab_align) if options.with_kd else None
    )
    dtypes = (student.dtype, student.dtype if teacher is None else teacher.dtype)
    loss_T, _ = _forward(
        student,
        teacher,
        rows.labels_T if options.with_ce else None,
        rows.keep_T,
        *options,
        softcap or 0.0,
        backends.choose(backend, student, IMPLS, dtypes=dtypes),
    )
    return reduce_rows(loss_T, rows, reduction, tuple(student_logits.shape[:-1]))


def _check_logits(logits: Tensor, argument: str) -> Tensor:
    """Logits [..., V] as a view [A, B, V] of two row strides; a copy only where no such view is."""
    (V,) = expect(logits, OP, argument, "... V")
    expect_that(V >= 1, OP, argument, "[..., V] with V >= 1", list(logits.shape))
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() > 3:
        return logits.flatten(1, -2)
    return logits[(None,) * (3 - logits.dim())]


def _check_teacher(student: Tensor, teacher: Tensor | None, vocab_align: str) -> Tensor:
    """The teacher beside student [..., V_s]: same leading dims, V_t = V_s unless truncated."""
    expect_option(vocab_align, OP, "vocab_align", VOCAB_ALIGNS)
    if teacher is None:
        raise ValueError(f"{OP}: teacher_logits must be given when kd_weight != 0, got None")
    expect(teacher, OP, "teacher_logits", "... V", like=student)
    same_rows = teacher.shape[:-1] == student.shape[:-1]
    same_vocabulary = teacher.shape[-1] == student.shape[-1]
    hint = "; pass vocab_align='truncate' to compare the shared columns" if same_rows else ""
    wanted, got = f"[..., V] = {list(student.shape)}", f"{list(teacher.shape)}{hint}"
    fits = same_rows and (same_vocabulary or vocab_align == "truncate")
    expect_that(fits, OP, "teacher_logits", wanted, got)
    return _check_logits(teacher, "teacher_logits")


@torch.library.custom_op("deepfusion::kl_distillation", mutates_args=())
def _forward(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    keep: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    kd_scale: float,
    ce_weight: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    refuse_bad_labels(OP, labels, keep, student.shape[-1])
    options = Options(divergence, beta, temperature, kd_scale, ce_weight, softcap)
    loss, stats = IMPLS[backend].forward(student, teacher, labels, keep, options)
    return loss, stats


@_forward.register_fake
def _(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    keep: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    kd_scale: float,
    ce_weight: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    T = student.shape[0] * student.shape[1]
    wide = wide_dtype(student, teacher)
    saved = IMPLS[backend].SAVED
    return student.new_empty(T, dtype=wide), student.new_empty(T, saved, dtype=wide)


@torch.library.custom_op("deepfusion::kl_distillation_backward", mutates_args=())
def _backward(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    keep: Tensor | None,
    stats: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    kd_scale: float,
    ce_weight: float,
    softcap: float,
    backend: str,
    needs_dstudent: bool,
    needs_dteacher: bool,
) -> tuple[Tensor, Tensor]:
    options = Options(divergence, beta, temperature, kd_scale, ce_weight, softcap)
    needs = (needs_dstudent, needs_dteacher)
    rows = (student, teacher, labels, keep, stats)
    dstudent, dteacher = IMPLS[backend].backward(dloss, *rows, options, *needs)
    return dstudent, dteacher


@_backward.register_fake
def _(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    keep: Tensor | None,
    stats: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    kd_scale: float,
    ce_weight: float,
    softcap: float,
    backend: str,
    needs_dstudent: bool,
    needs_dteacher: bool,
) -> tuple[Tensor, Tensor]:
    dstudent = student.new_empty(student.shape if needs_dstudent else 0)
    like = student if teacher is None else teacher
    return dstudent, like.new_empty(like.shape if needs_dteacher else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, labels, keep, *ctx.options = inputs
    ctx.save_for_backward(student, teacher, labels, keep, output[1])


def _gradient(ctx: Any, dloss: Tensor, dstats: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_dstudent, needs_dteacher = ctx.needs_input_grad[:2]
    dstudent, dteacher = _backward(
        dloss, *ctx.saved_tensors, *ctx.options, needs_dstudent, needs_dteacher
    )
    gradients = (dstudent if needs_dstudent else None, dteacher if needs_dteacher else None)
    return *gradients, *(None,) * 9


_forward.register_autograd(_gradient, setup_context=_setup_context)
