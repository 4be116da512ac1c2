"""Distillation from the K likeliest tokens of each teacher row, and the choice of those tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...checks import INTEGERS, expect, expect_option, expect_that
from ..shared.kl_options import REDUCTIONS, check_rows, kl_options, refuse_bad_labels
from ..shared.row_scale import row_scale
from . import native_impl, reference, triton_impl
from .logprobs import CHUNK_BYTES, Teacher, by_chunks
from .problem import TAILS, Problem

OP = "topk_kl_distillation"
DOORS = ("topk_kl_distillation", "topk_logprobs")
IMPLS = {"reference": reference, "cpu": native_impl, "triton": triton_impl}


def topk_kl_distillation(
    student_logits: Tensor,
    teacher_ids: Tensor | None,
    teacher_logprobs: Tensor | None,
    labels: Tensor | None = None,
    *,
    tail: str = "bucket",
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Loss kd_weight KD + ce_weight CE; KD sees the teacher's kept tokens and a rule for the rest.

    student_logits [..., V] float; teacher_ids [..., K] int32 or int64: ids outside [0, V) are
    padding, of equal ids the first counts; teacher_logprobs [..., K], ln p at the temperature used;
    labels [...]; row_weight [...] -> float32 scalar, or [...] for reduction 'none'. tail 'bucket'
    compares the rest as one outcome, 'zero' drops it, 'renormalize' compares the kept tokens alone.
    Formula and gradient: docs/ops/topk_kl.md. Raises ValueError naming the argument.
    """
    options = kl_options(
        OP, divergence, beta, temperature, scale_by_temperature_squared, kd_weight, ce_weight
    )
    expect_option(reduction, OP, "reduction", REDUCTIONS)
    expect_option(tail, OP, "tail", TAILS)
    if tail == "zero":
        expect_option(options.divergence, OP, "divergence with tail 'zero'", ("forward_kl",))
    (V,) = expect(student_logits, OP, "student_logits", "... V")
    expect_that(V >= 1, OP, "student_logits", "[..., V] with V >= 1", list(student_logits.shape))
    rows = check_rows(OP, student_logits, labels, row_weight, ignore_index, ce_weight)
    lead = student_logits.shape[:-1]
    ids_TK, logprobs_TK = (
        _kept(student_logits, teacher_ids, teacher_logprobs)
        if options.with_kd
        # a teacher that is not read has kept nothing
        else (
            student_logits.new_empty((lead.numel(), 0), dtype=kind) for kind in (torch.int64, None)
        )
    )
    wide = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    rows_T: Tensor = _forward(
        _as_rows(student_logits),
        ids_TK,
        logprobs_TK,
        rows.labels_T if options.with_ce else None,
        row_scale(ids_TK, rows, reduction, wide),
        tail,
        *options,
        backends.choose(backend, student_logits, IMPLS, K=ids_TK.shape[-1]),
    )[0]
    return rows_T.reshape(lead) if reduction == "none" else rows_T.sum()


def _as_rows(logits: Tensor) -> Tensor:
    """[A, B, V] of two row strides: slices and transpositions of [B, L, V] need no copy."""
    if logits.dim() > 3:
        return logits.flatten(1, -2)
    return logits[(None,) * (3 - logits.dim())]


def _kept(student: Tensor, ids: Tensor | None, logprobs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The teacher's entries as [T, K]."""
    if ids is None or logprobs is None:
        missing = "teacher_ids" if ids is None else "teacher_logprobs"
        raise ValueError(f"{OP}: {missing} must be given when kd_weight != 0, got None")
    lead = student.shape[:-1]
    (K,) = expect(ids, OP, "teacher_ids", "... K", dtype=INTEGERS, like=student)
    expect(logprobs, OP, "teacher_logprobs", "... K", K=K, like=student)
    for name, tensor in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
        wanted, got = [*lead, K], list(tensor.shape)
        expect_that(got == wanted, OP, name, f"[..., K] = {wanted}", got)
    wants = torch.is_grad_enabled() and logprobs.requires_grad
    expect_that(not wants, OP, "teacher_logprobs", "detached", "requires_grad; pass .detach()")
    T = lead.numel()
    return ids.reshape(T, K), logprobs.reshape(T, K)


@torch.library.custom_op("deepfusion::topk_kl", mutates_args=())
def _forward(
    student_ABV: Tensor,
    ids_TK: Tensor,
    logprobs_TK: Tensor,
    labels: Tensor | None,
    scale_T: Tensor,
    tail: str,
    divergence: str,
    beta: float,
    temperature: float,
    kd_scale: float,
    ce_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    problem = Problem(
        student_ABV, ids_TK, logprobs_TK, labels, scale_T, tail, divergence, beta, temperature,
        kd_scale, ce_weight,
    )  # fmt: skip
    refuse_bad_labels(OP, labels, scale_T != 0, student_ABV.shape[-1])
    rows_T, statistics = IMPLS[backend].forward(problem)
    return rows_T, statistics


@_forward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    scale_T = Problem(*args[:-1]).scale_T
    return torch.empty_like(scale_T), scale_T.new_empty(
        (scale_T.shape[0], IMPLS[args[-1]].STATISTICS)
    )


@torch.library.custom_op("deepfusion::topk_kl_backward", mutates_args=())
def _backward(
    drows_T: Tensor,
    statistics: Tensor,
    student_ABV: Tensor,
    ids_TK: Tensor,
    logprobs_TK: Tensor,
    labels: Tensor | None,
    scale_T: Tensor,
    tail: str,
    divergence: str,
    beta: float,
    temperature: float,
    kd_scale: float,
    ce_weight: float,
    backend: str,
) -> Tensor:
    problem = Problem(
        student_ABV, ids_TK, logprobs_TK, labels, scale_T, tail, divergence, beta, temperature,
        kd_scale, ce_weight,
    )  # fmt: skip
    dstudent_ABV: Tensor = IMPLS[backend].backward(problem, drows_T, statistics)
    return dstudent_ABV


@_backward.register_fake
def _(drows_T: Tensor, statistics: Tensor, student_ABV: Tensor, *rest: Any) -> Tensor:
    return student_ABV.new_empty(student_ABV.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:5])
    ctx.options = inputs[5:]


def _autograd(ctx: Any, drows_T: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(drows_T, *ctx.saved_tensors, *ctx.options), *(None,) * 11


_forward.register_autograd(_autograd, setup_context=_setup_context)


def topk_logprobs(
    logits_or_hidden: Tensor,
    k: int,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row and their ln p: the teacher of topk_kl_distillation.

    Logits [..., V], or hidden states [..., D] beside a head weight [V, D] and bias [V], one float
    dtype -> ids [..., k] int64, log-probabilities at the temperature [..., k] float32 (float64 for
    float64), largest first; which of equal logits is kept is the backend's choice. Of wider logits
    chunk_bytes (default 64 MiB) exist at a time. No gradient. Raises ValueError for any argument.
    """
    op = "topk_logprobs"
    (C,) = expect(logits_or_hidden, op, "logits_or_hidden", "... C")
    V = C
    if weight is not None:
        dtype = logits_or_hidden.dtype
        V, _ = expect(weight, op, "weight", "V D", D=C, dtype=dtype, like=logits_or_hidden)
    if bias is not None:
        expect_that(weight is not None, op, "bias", "given with a weight", "a bias alone")
        expect(bias, op, "bias", "V", V=V, like=logits_or_hidden)
    for tensor in (logits_or_hidden, weight, bias):
        wants = torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        expect_that(not wants, op, "the teacher", "detached", "requires_grad; pass .detach()")
    expect_that(1 <= k <= V, op, "k", f"in [1, V] = [1, {V}]", k)
    expect_that(
        1e-6 <= temperature < float("inf"), op, "temperature", "finite and >= 1e-6", temperature
    )
    expect_that(chunk_bytes is None or chunk_bytes > 0, op, "chunk_bytes", "positive", chunk_bytes)
    lead = logits_or_hidden.shape[:-1]
    ids_TK, logprobs_TK = _select(
        logits_or_hidden.reshape(lead.numel(), C), weight, bias, k, temperature,
        chunk_bytes or CHUNK_BYTES, backends.choose(backend, logits_or_hidden, IMPLS),
    )  # fmt: skip
    return ids_TK.reshape(*lead, k), logprobs_TK.reshape(*lead, k)


@torch.library.custom_op("deepfusion::topk_logprobs", mutates_args=())
def _select(
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    k: int,
    temperature: float,
    chunk_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    teacher = Teacher(rows, weight, bias, k, temperature, chunk_bytes)
    ids, logprobs = by_chunks(teacher, IMPLS[backend].select)
    return ids, logprobs


@_select.register_fake
def _(rows: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    teacher = Teacher(rows, *rest[:-1])
    shape = (rows.shape[0], teacher.k)
    return rows.new_empty(shape, dtype=torch.int64), rows.new_empty(shape, dtype=teacher.wide)
