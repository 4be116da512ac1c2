"""The fused linear loss with both heads cut by vocabulary over the ranks of a process group.

Rank i holds the columns [first_i, first_i + V_i) and every token. Sums of a row merge across ranks:
    m = max_i m_i,   shift = (m_i - m) / tau,   l = sum_i l_i e^shift
    a = sum_i (a_i + l_t (shift_t - shift_s)) e^shift_t
    r = sum_i (r_i + l_s (shift_s - shift_t)) e^shift_s
Forward: one MAX, one SUM (jsd: a second SUM); backward: one SUM of dhidden. dW stays with its head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backends
from ...checks import expect, expect_option, expect_that
from ..shared.kl_options import REDUCTIONS, check_rows, kl_options, refuse_bad_labels, wide_dtype
from ..shared.row_scale import row_scale
from . import native_impl
from .problem import Gradients, Problem, Wants
from .tiles import plan

OP = "vocabulary_parallel_kl_distillation"
IMPLS = {"cpu": native_impl}
CHUNK_BYTES = 2 << 20
Group = dist.ProcessGroup | None


def vocabulary_parallel_kl_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    first_column: int,
    num_columns: int,
    group: Group = None,
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
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """fused_linear_kl_distillation of heads whose rows [first_column, first_column + V_i) are here.

    student_hidden [..., D_s], student_weight [V_i, D_s], the teacher's alike and detached; hidden
    states, labels and row_weight are the same on every rank, labels within [0, num_columns) -> the
    whole loss on every rank, float32 scalar, or [...] for 'none'. dhidden is whole on every rank,
    dweight is this shard's. Eager only: collectives of `group`. Raises ValueError.
    """
    options = kl_options(
        OP, divergence, beta, temperature, scale_by_temperature_squared, kd_weight, ce_weight
    )
    expect_option(reduction, OP, "reduction", REDUCTIONS)
    (D,) = expect(student_hidden, OP, "student_hidden", "... D")
    like: dict[str, Any] = {"dtype": student_hidden.dtype, "like": student_hidden}
    V, _ = expect(student_weight, OP, "student_weight", "V D", D=D, **like)
    within = first_column >= 0 and first_column + V <= num_columns
    wanted = f"a shard [first, first + V) = [{first_column}, {first_column + V})"
    expect_that(within, OP, "student_weight", f"{wanted} of num_columns columns", num_columns)
    rows = check_rows(OP, student_hidden, labels, row_weight, ignore_index, ce_weight)
    teacher: tuple[Tensor | None, Tensor | None] = (None, None)
    if options.with_kd:
        teacher = _teacher(student_hidden, V, teacher_hidden, teacher_weight)
    hidden_TD = student_hidden.reshape(student_hidden.shape[:-1].numel(), D)
    scale_T = row_scale(hidden_TD, rows, reduction, wide_dtype(student_hidden, teacher[0]))
    refuse_bad_labels(OP, rows.labels_T if options.with_ce else None, scale_T != 0, num_columns)
    if backends.choose(backend, student_hidden, IMPLS) not in IMPLS:
        device = student_hidden.device.type
        raise NotImplementedError(f"{OP}: only the CPU backend has this form, got {device} tensors")
    problem = Problem(
        hidden_TD, student_weight, None, *teacher, None,
        rows.labels_T if options.with_ce else None, scale_T, options.divergence, options.beta,
        options.temperature, options.kd_scale, options.ce_weight, chunk_bytes,
    )  # fmt: skip
    rows_T: Tensor = _Sharded.apply(  # type: ignore[no-untyped-call]
        hidden_TD, student_weight, problem, first_column, group
    )
    return rows_T.reshape(student_hidden.shape[:-1]) if reduction == "none" else rows_T.sum()


def _teacher(
    student: Tensor, V: int, hidden: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The teacher's tensors, rows flattened; it has the student's tokens and shard."""
    if hidden is None or weight is None:
        missing = "teacher_hidden" if hidden is None else "teacher_weight"
        raise ValueError(f"{OP}: {missing} must be given when kd_weight != 0, got None")
    (D,) = expect(hidden, OP, "teacher_hidden", "... D", like=student)
    expect(weight, OP, "teacher_weight", "V D", V=V, D=D, dtype=hidden.dtype, like=student)
    wanted = [*student.shape[:-1], D]
    expect_that(list(hidden.shape) == wanted, OP, "teacher_hidden", str(wanted), list(hidden.shape))
    wants = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    expect_that(not wants, OP, "the teacher", "detached", "requires_grad; pass .detach()")
    return hidden.reshape(hidden.shape[:-1].numel(), D), weight


class _Sharded(torch.autograd.Function):
    """Rows [T] times their scale, equal on every rank."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, problem: Problem, first_column: int, group: Group
    ) -> Tensor:
        problem = problem._replace(student_hidden=hidden, student_weight=weight)
        rows = native_impl.Rows(problem, plan(problem, whole_rows=False), first_column)
        sums = merged(rows.sums(rows.blocks), problem.temperature, group)
        losses_T, statistics = rows.finish(sums, problem.scale_T)
        if problem.divergence == "jsd" and problem.compared:
            rows.add_jsd(rows.blocks, statistics, sums)
            means = sums[:, native_impl.MEANS]
            dist.all_reduce(means, group=group)
            sums[:, native_impl.MEANS] = means
            losses_T, statistics = rows.finish(sums, problem.scale_T)
        ctx.save_for_backward(statistics, *problem[:8])
        ctx.rest, ctx.first_column, ctx.group = problem[8:], first_column, group
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_T: Tensor) -> tuple[Tensor | None, ...]:
        statistics, *tensors = ctx.saved_tensors
        problem = Problem(*tensors, *ctx.rest)
        wants = Wants(ctx.needs_input_grad[0], ctx.needs_input_grad[1], False)
        found: Gradients = native_impl.backward(
            problem, drows_T, statistics, wants, ctx.first_column
        )
        if wants.hidden:
            dist.all_reduce(found.dhidden, group=ctx.group)
        return (
            found.dhidden if wants.hidden else None,
            found.dweight if wants.weight else None,
            *(None,) * 3,
        )


def merged(sums: Tensor, temperature: float, group: Group) -> Tensor:
    """The whole row's sums [T, 13] from every rank's own."""
    own_T3 = sums[:, native_impl.MAXIMA]
    whole_T3 = own_T3.clone()
    dist.all_reduce(whole_T3, dist.ReduceOp.MAX, group=group)
    shift_T3 = own_T3 - whole_T3
    shift_s, shift_t = (shift_T3[:, at] / temperature for at in (0, 1))
    l_s, l_t, a, r = (sums[:, at] for at in (1, 3, 4, 5))
    sums = sums.clone()
    for at, value, shift in (
        (1, l_s, shift_s),
        (3, l_t, shift_t),
        (4, a + l_t * (shift_t - shift_s), shift_t),
        (5, r + l_s * (shift_s - shift_t), shift_s),
        (9, sums[:, 9], shift_T3[:, 2]),
    ):
        factor = shift.exp()
        # a factor of 0 erases sums over columns that were all missing; they may be infinite
        sums[:, at] = torch.where(factor == 0, 0, value * factor)
    sums[:, native_impl.MAXIMA] = 0
    dist.all_reduce(sums, group=group)
    sums[:, native_impl.MAXIMA] = whole_T3
    return sums
