"""Distillation and cross entropy from hidden states and heads, without the logits in memory.

Two ways, chosen at the door by how many rows of logits chunk_bytes holds:
    many   the gradient of a chunk is formed while its logits are there, in forward; backward scales it
    few    forward keeps a few statistics of each row; backward projects again, vocabulary outermost
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...checks import expect, expect_option, expect_that
from ..shared.loss_options import expect_loss_options, expect_rows, resolve_divergence, row_scale
from . import native_impl, reference
from .problem import Gradients, Problem, Wants

DOORS = ("fused_linear_kl_distillation",)
IMPLS = {"reference": reference, "cpu": native_impl}
# below this a chunk's GEMMs no longer hide the traffic of the weight's gradient; docs/ops/fused_linear_kl.md
MIN_CHUNK_ROWS = 128
CPU_CHUNK_BYTES = 2 << 20
GRAD_WEIGHT_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


def fused_linear_kl_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    vocab_align: str = "error",
    reduction: str = "mean",
    backend: str | None = None,
    chunk_bytes: int | None = None,
    grad_weight_dtype: torch.dtype | None = None,
) -> Tensor:
    """Loss kd_weight KD + ce_weight CE of the logits hidden @ weight.T + bias, in float32.

    student_hidden [..., D_s], student_weight [V_s, D_s], student_bias [V_s]; the teacher's alike and
    detached, or None with kd_weight = 0; labels [...] integer; row_weight [...] float -> scalar, or
    [...] for reduction 'none'. vocab_align 'truncate' compares the first min(V_s, V_t) columns.
    chunk_bytes bounds the logits in memory at a time; grad_weight_dtype accumulates d student_weight.
    Formula and gradient: docs/ops/fused_linear_kl.md. Raises ValueError naming the argument.
    """
    op = DOORS[0]
    expect_loss_options(
        op, divergence, beta, temperature, kd_weight, ce_weight, labels, reduction
    )
    expect_option(vocab_align, op, "vocab_align", ("error", "truncate"))
    expect_option(grad_weight_dtype, op, "grad_weight_dtype", GRAD_WEIGHT_DTYPES)
    V_s, D_s = _expect_side(op, "student", student_hidden, student_weight, student_bias)
    V_t, D_t, lead = 0, 0, student_hidden.shape[:-1]
    if kd_weight == 0:
        teacher_hidden = teacher_weight = teacher_bias = None
    else:
        expect_that(teacher_hidden is not None, op, "teacher_hidden", "given", "None")
        expect_that(teacher_weight is not None, op, "teacher_weight", "given", "None")
        assert teacher_hidden is not None and teacher_weight is not None, "refused above"
        V_t, D_t = _expect_side(op, "teacher", teacher_hidden, teacher_weight, teacher_bias)
        _expect_teacher(op, student_hidden, teacher_hidden, teacher_weight, teacher_bias)
        wanted = f"[V, D_t] = [{V_s}, {D_t}]; pass vocab_align='truncate' to compare the shared columns"
        same = V_s == V_t or vocab_align == "truncate"
        expect_that(same, op, "teacher_weight", wanted, [V_t, D_t])
    for name, rows in (("labels", labels), ("row_weight", row_weight)):
        if rows is not None:
            expect_rows(rows, op, name, lead, student_hidden)
    T = lead.numel()
    hidden_TD = student_hidden.reshape(T, D_s)
    teacher_TD = None if teacher_hidden is None else teacher_hidden.reshape(T, D_t)
    squared = temperature**2 if scale_by_temperature_squared else 1.0
    problem = Problem(
        hidden_TD, student_weight, student_bias, teacher_TD, teacher_weight, teacher_bias,
        None if labels is None or not ce_weight else labels.reshape(T), hidden_TD.new_empty(0),
        resolve_divergence(divergence, beta), beta, temperature, kd_weight * squared, ce_weight, 0,
    )  # fmt: skip
    scale_T = row_scale(hidden_TD, labels, row_weight, ignore_index, reduction, problem.wide)
    chunk_bytes = _chunk_bytes(op, chunk_bytes, problem)
    problem = problem._replace(scale_T=scale_T, chunk_bytes=chunk_bytes)
    chosen = backends.choose(backend, student_hidden, IMPLS)
    in_forward = reduction != "none" and chunk_bytes >= MIN_CHUNK_ROWS * _row_bytes(problem)
    wants = _wants(student_hidden, student_weight, student_bias)
    loss = _forward(*problem, *wants, in_forward, grad_weight_dtype or problem.wide, chosen)[0]
    if in_forward:
        return loss
    return loss.reshape(lead) if reduction == "none" else loss.sum()


def _expect_side(
    op: str, side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[int, int]:
    """Vocabulary and width of one side."""
    (D,) = expect(hidden, op, f"{side}_hidden", "... D")
    V, _ = expect(weight, op, f"{side}_weight", "V D", D=D, dtype=hidden.dtype, like=hidden)
    if bias is not None:
        expect(bias, op, f"{side}_bias", "V", V=V, like=hidden)
    return V, D


def _expect_teacher(op: str, student: Tensor, hidden: Tensor, *constants: Tensor | None) -> None:
    """The teacher stands at the student's tokens and is a constant."""
    wanted = [*student.shape[:-1], hidden.shape[-1]]
    same = list(hidden.shape) == wanted
    expect_that(same, op, "teacher_hidden", f"[..., D_t] = {wanted}", list(hidden.shape))
    device = student.device
    expect_that(hidden.device == device, op, "teacher_hidden", f"on {device}", hidden.device)
    if torch.is_grad_enabled():
        for tensor in (hidden, *constants):
            wants = tensor is not None and tensor.requires_grad
            expect_that(not wants, op, "the teacher", "detached", "requires_grad; pass .detach()")


def _row_bytes(problem: Problem) -> int:
    """Bytes of one token's logits on both sides."""
    sides = problem.columns + problem.compared
    return sides * problem.wide.itemsize


def _chunk_bytes(op: str, asked: int | None, problem: Problem) -> int:
    if asked is not None:
        expect_that(asked > 0, op, "chunk_bytes", "positive", asked)
        return asked
    if problem.student_hidden.device.type == "cpu":
        return CPU_CHUNK_BYTES
    return max(512 * _row_bytes(problem), 640 << 20)


def _wants(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Wants:
    enabled = torch.is_grad_enabled()
    with_bias = bias is not None and bias.requires_grad
    return Wants(enabled and hidden.requires_grad, enabled and weight.requires_grad, enabled and with_bias)


@torch.library.custom_op("deepfusion::fused_linear_kl", mutates_args=())
def _forward(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    scale_T: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    chunk_bytes: int,
    needs_dhidden: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    in_forward: bool,
    grad_weight_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
        labels, scale_T, divergence, beta, temperature, kd_weight, ce_weight, chunk_bytes,
    )  # fmt: skip
    wants = Wants(*(in_forward and need for need in (needs_dhidden, needs_dweight, needs_dbias)))
    rows_T, statistics, kept = IMPLS[backend].forward(problem, wants, grad_weight_dtype)
    return rows_T.sum() if in_forward else rows_T, statistics, *kept


@_forward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    problem, (dhidden, dweight, dbias, in_forward, dtype, backend) = Problem(*args[:14]), args[14:]
    T = problem.scale_T.shape[0]
    loss = problem.scale_T.new_empty(() if in_forward else (T,))
    kept = _empty_gradients(
        problem, Wants(*(in_forward and need for need in (dhidden, dweight, dbias))),
        (problem.wide, dtype, problem.wide),
    )  # fmt: skip
    return loss, loss.new_empty((T, IMPLS[backend].STATISTICS)), *kept


def _empty_gradients(
    problem: Problem, wants: Wants, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> Gradients:
    V, D = problem.student_weight.shape
    shapes = (problem.student_hidden.shape, (V, D), (V,))
    rows = zip(wants, shapes, dtypes, strict=True)
    empty = problem.student_hidden.new_empty
    return Gradients(*(empty(shape if want else (0,), dtype=dtype) for want, shape, dtype in rows))


@torch.library.custom_op("deepfusion::fused_linear_kl_backward", mutates_args=())
def _backward(
    drows_T: Tensor,
    statistics: Tensor,
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    scale_T: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    chunk_bytes: int,
    needs_dhidden: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
        labels, scale_T, divergence, beta, temperature, kd_weight, ce_weight, chunk_bytes,
    )  # fmt: skip
    wants = Wants(needs_dhidden, needs_dweight, needs_dbias)
    return IMPLS[backend].backward(problem, drows_T, statistics, wants)


@_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    problem = Problem(*args[2:16])
    return _empty_gradients(problem, Wants(*args[16:19]), problem.dtypes)


@torch.library.custom_op("deepfusion::fused_linear_kl_scale", mutates_args=())
def _scale(kept: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """Out of place: kept serves a second backward of the same graph."""
    scaled = torch.empty_like(kept, dtype=dtype)
    return torch.mul(kept, dloss, out=scaled)


@_scale.register_fake
def _(kept: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(kept, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *problem, _, _, _, in_forward, _, ctx.backend = inputs
    # else autograd fills a zero gradient of the size of every kept gradient
    ctx.set_materialize_grads(False)
    ctx.in_forward, ctx.dtypes = in_forward, Problem(*problem).dtypes
    if in_forward:
        ctx.save_for_backward(*output[2:])
    else:
        ctx.save_for_backward(output[1], *problem[:8])
        ctx.options = problem[8:]


def _autograd(ctx: Any, dloss: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    wants = Wants(*ctx.needs_input_grad[:3])
    if ctx.in_forward:
        kept = zip(wants, ctx.saved_tensors, ctx.dtypes, strict=True)
        found = [_scale(tensor, dloss, dtype) if want else None for want, tensor, dtype in kept]
    else:
        gradients = _backward(dloss, *ctx.saved_tensors, *ctx.options, *wants, ctx.backend)
        found = [gradient if want else None for want, gradient in zip(wants, gradients, strict=True)]
    return *found, *(None,) * 17


_forward.register_autograd(_autograd, setup_context=_setup_context)
