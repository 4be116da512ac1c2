"""Two distributions over different vocabularies by their sorted probabilities.

loss_t = sum_i |q_(i) - p_(i)|     q = softmax(s / tau), p = softmax(t / tau), both descending,
                                   the shorter one padded with zeros
ds     = dloss q (sigma - sum sigma q) / tau     sigma = sign(q_(i) - p_(i)) in the student's order
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import expect, expect_option, expect_that
from ..ops.shared.kl_options import REDUCTIONS, check_rows, wide_dtype
from ..ops.shared.row_scale import row_scale

OP = "uld_distillation"
# of the wide copies of a chunk of rows; unmeasured
CHUNK_BYTES = 64 << 20


def uld_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Universal logit distillation, sum_i |q_(i) - p_(i)|: blind to which token is which.

    student_logits [..., V_s], teacher_logits [..., V_t] float, rows at one place in the text (see
    `paired_rows`); row_weight [...], 0 masks a row -> float32 (float64 for float64) scalar, or
    [...] for reduction 'none'. Raises ValueError naming the argument; RuntimeError for a second
    derivative. Source: arXiv 2402.12030, equation 5.
    """
    fits = 1e-6 <= temperature < math.inf
    expect_that(fits, OP, "temperature", "finite and >= 1e-6", temperature)
    expect_option(reduction, OP, "reduction", REDUCTIONS)
    (V,) = expect(student_logits, OP, "student_logits", "... V")
    (U,) = expect(teacher_logits, OP, "teacher_logits", "... V_t", like=student_logits)
    expect_that(V >= 1, OP, "student_logits", "[..., V_s] with V_s >= 1", V)
    expect_that(U >= 1, OP, "teacher_logits", "[..., V_t] with V_t >= 1", U)
    lead = student_logits.shape[:-1]
    got, wanted = list(teacher_logits.shape), [*lead, U]
    expect_that(got == wanted, OP, "teacher_logits", f"[..., V_t] = {wanted}", got)
    asks = torch.is_grad_enabled() and teacher_logits.requires_grad
    expect_that(not asks, OP, "teacher_logits", "detached", "requires_grad; pass .detach()")
    rows = check_rows(OP, student_logits, None, row_weight, 0, 0.0)
    student_TV, teacher_TU = student_logits.reshape(-1, V), teacher_logits.reshape(-1, U)
    scale_T = row_scale(student_TV, rows, reduction, wide_dtype(student_logits, teacher_logits))
    needs = torch.is_grad_enabled() and student_logits.requires_grad
    rows_T: Tensor = _forward(student_TV, teacher_TU, scale_T, temperature, needs)[0]
    return rows_T.reshape(lead) if reduction == "none" else rows_T.sum()


@torch.library.custom_op("deepfusion::uld", mutates_args=())
def _forward(
    student_TV: Tensor, teacher_TU: Tensor, scale_T: Tensor, temperature: float, needs: bool
) -> tuple[Tensor, Tensor]:
    """Rows [T] times their scale, and sigma [T, V] int8 where a gradient is wanted."""
    (T, V), U = student_TV.shape, teacher_TU.shape[1]
    rows_T = torch.zeros_like(scale_T)
    signs = student_TV.new_zeros((T if needs else 0, V), dtype=torch.int8)
    for part in _chunks(T, V + U, scale_T):
        keep_T1 = scale_T[part, None] != 0
        q_TV, p_TU = (
            _probabilities(one[part], keep_T1, scale_T.dtype, temperature)
            for one in (student_TV, teacher_TU)
        )
        q_TV, order_TV = q_TV.sort(dim=1, descending=True, stable=True)
        p_TU = p_TU.sort(dim=1, descending=True).values
        gap = F.pad(q_TV, (0, max(U - V, 0))) - F.pad(p_TU, (0, max(V - U, 0)))
        rows_T[part] = torch.where(keep_T1[:, 0], scale_T[part] * gap.abs().sum(1), 0)
        if needs:
            signs[part] = signs[part].scatter(1, order_TV, gap[:, :V].sign().to(torch.int8))
    return rows_T, signs


@_forward.register_fake
def _(
    student_TV: Tensor, teacher_TU: Tensor, scale_T: Tensor, temperature: float, needs: bool
) -> tuple[Tensor, Tensor]:
    T, V = student_TV.shape
    signs = student_TV.new_empty((T if needs else 0, V), dtype=torch.int8)
    return torch.empty_like(scale_T), signs


@torch.library.custom_op("deepfusion::uld_backward", mutates_args=())
def _backward(
    drows_T: Tensor, signs_TV: Tensor, student_TV: Tensor, scale_T: Tensor, temperature: float
) -> Tensor:
    T, V = student_TV.shape
    dstudent_TV = torch.zeros_like(student_TV, memory_format=torch.contiguous_format)
    for part in _chunks(T, V, scale_T):
        keep_T1 = scale_T[part, None] != 0
        q_TV = _probabilities(student_TV[part], keep_T1, scale_T.dtype, temperature)
        sigma_TV = signs_TV[part].to(scale_T.dtype)
        sigma_TV -= (sigma_TV * q_TV).sum(1, keepdim=True)
        factor_T1 = (drows_T[part] * scale_T[part] / temperature)[:, None]
        dstudent_TV[part] = torch.where(keep_T1, factor_T1 * q_TV * sigma_TV, 0).to(
            student_TV.dtype
        )
    return dstudent_TV


@_backward.register_fake
def _(drows_T: Tensor, signs_TV: Tensor, student_TV: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(student_TV, memory_format=torch.contiguous_format)


def _chunks(T: int, columns: int, scale_T: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // (columns * scale_T.element_size()))
    yield from (slice(start, min(start + step, T)) for start in range(0, T, step))


def _probabilities(
    logits_TV: Tensor, keep_T1: Tensor, wide: torch.dtype, temperature: float
) -> Tensor:
    """softmax(logits / tau); a masked row is never read."""
    return (torch.where(keep_T1, logits_TV, 0).to(wide) / temperature).softmax(1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student_TV, _, scale_T, ctx.temperature, _ = inputs
    ctx.save_for_backward(output[1], student_TV, scale_T)


def _autograd(ctx: Any, drows_T: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(drows_T, *ctx.saved_tensors, ctx.temperature), None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
