"""Distillation and cross entropy from hidden states and heads, without the logits in memory.

Two ways, chosen at the door by how many rows of logits chunk_bytes holds:
    many   a chunk's gradient is formed in forward, while its logits are there; backward scales it
    few    forward keeps a few statistics of each row; backward projects again, vocabulary outermost
"""

from __future__ import annotations

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
    refuse_bad_labels,
    wide_dtype,
)
from ..shared.row_scale import row_scale
from . import native_impl, reference, triton_impl
from .problem import Gradients, Problem, Wants

OP = "fused_linear_kl_distillation"
DOORS = ("fused_linear_kl_distillation",)
IMPLS = {"reference": reference, "cpu": native_impl, "triton": triton_impl}
# with fewer rows the traffic of dW costs more than projecting twice; docs/ops/fused_linear_kl.md
MIN_CHUNK_ROWS = 128
CPU_CHUNK_BYTES = 2 << 20
Teacher = tuple[Tensor | None, Tensor | None, Tensor | None]
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

    student_hidden [..., D_s], student_weight [V_s, D_s], student_bias [V_s]; the teacher's alike
    and detached, or None with kd_weight = 0; labels, row_weight [...] -> scalar, or [...] for
    reduction 'none'. vocab_align 'truncate': the first min(V_s, V_t) columns. chunk_bytes bounds
    the logits, grad_weight_dtype sums dW. Raises ValueError. Math: docs/ops/fused_linear_kl.md.
    """
    options = kl_options(
        OP, divergence, beta, temperature, scale_by_temperature_squared, kd_weight, ce_weight
    )
    expect_option(reduction, OP, "reduction", REDUCTIONS)
    expect_option(vocab_align, OP, "vocab_align", VOCAB_ALIGNS)
    expect_option(grad_weight_dtype, OP, "grad_weight_dtype", GRAD_WEIGHT_DTYPES)
    V, D = _expect_side("student", student_hidden, student_weight, student_bias)
    rows = check_rows(OP, student_hidden, labels, row_weight, ignore_index, ce_weight)
    teacher: Teacher = (None, None, None)
    if options.with_kd:
        widest = V if vocab_align == "error" else None
        teacher = _teacher(student_hidden, widest, teacher_hidden, teacher_weight, teacher_bias)
    hidden_TD = student_hidden.reshape(student_hidden.shape[:-1].numel(), D)
    wide = wide_dtype(student_hidden, teacher[0])
    problem = Problem(
        hidden_TD, student_weight, student_bias, *teacher,
        rows.labels_T if options.with_ce else None,
        row_scale(hidden_TD, rows, reduction, wide), options.divergence, options.beta,
        options.temperature, options.kd_scale, options.ce_weight, 0,
    )  # fmt: skip
    problem = problem._replace(chunk_bytes=_chunk_bytes(chunk_bytes, problem))
    in_forward = reduction != "none" and _holds_enough_rows(problem)
    dtype = grad_weight_dtype or problem.wide
    wants = _wants(student_hidden, student_weight, student_bias)
    chosen = backends.choose(backend, student_hidden, IMPLS, wide=wide)
    loss: Tensor = _forward(*problem, *wants, in_forward, dtype, chosen)[0]
    if reduction == "none":
        return loss.reshape(student_hidden.shape[:-1])
    return loss if in_forward else loss.sum()


def _expect_side(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """Vocabulary and width of one side."""
    (D,) = expect(hidden, OP, f"{side}_hidden", "... D")
    V, _ = expect(weight, OP, f"{side}_weight", "V D", D=D, dtype=hidden.dtype, like=hidden)
    if bias is not None:
        expect(bias, OP, f"{side}_bias", "V", V=V, like=hidden)
    return V, D


def _teacher(
    student: Tensor,
    V: int | None,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Teacher:
    """The teacher's tensors, rows flattened: the student's tokens and vocabulary, no gradient."""
    if hidden is None or weight is None:
        missing = "teacher_hidden" if hidden is None else "teacher_weight"
        raise ValueError(f"{OP}: {missing} must be given when kd_weight != 0, got None")
    got, D = _expect_side("teacher", hidden, weight, bias)
    expect(hidden, OP, "teacher_hidden", "... D", like=student)
    wanted = [*student.shape[:-1], D]
    same = list(hidden.shape) == wanted
    expect_that(same, OP, "teacher_hidden", f"[..., D_t] = {wanted}", list(hidden.shape))
    hint = f"[{got}, {D}]; pass vocab_align='truncate' to compare the shared columns"
    expect_that(V in (None, got), OP, "teacher_weight", f"[V, D_t] = [{V}, {D}]", hint)
    for tensor in (hidden, weight, bias):
        wants = torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        expect_that(not wants, OP, "the teacher", "detached", "requires_grad; pass .detach()")
    return hidden.reshape(hidden.shape[:-1].numel(), D), weight, bias


def _holds_enough_rows(problem: Problem) -> bool:
    row_bytes = (problem.columns + problem.compared) * problem.wide.itemsize
    return problem.chunk_bytes >= MIN_CHUNK_ROWS * row_bytes


def _chunk_bytes(asked: int | None, problem: Problem) -> int:
    if asked is not None:
        expect_that(asked > 0, OP, "chunk_bytes", "positive", asked)
        return asked
    row_bytes = (problem.columns + problem.compared) * problem.wide.itemsize
    if problem.student_hidden.device.type == "cpu":
        # a narrow head's accumulator would be a second matrix of its size beside the result
        keeps = problem.student_weight.dtype == problem.wide
        return max(CPU_CHUNK_BYTES, MIN_CHUNK_ROWS * row_bytes if keeps else 0)
    return max(512 * row_bytes, 640 << 20)


def _wants(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Wants:
    enabled = torch.is_grad_enabled()
    with_bias = bias is not None and bias.requires_grad
    return Wants(
        enabled and hidden.requires_grad, enabled and weight.requires_grad, enabled and with_bias
    )


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
    kd_scale: float,
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
        labels, scale_T, divergence, beta, temperature, kd_scale, ce_weight, chunk_bytes,
    )  # fmt: skip
    refuse_bad_labels(OP, labels, scale_T != 0, student_weight.shape[0])
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
    kd_scale: float,
    ce_weight: float,
    chunk_bytes: int,
    needs_dhidden: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
        labels, scale_T, divergence, beta, temperature, kd_scale, ce_weight, chunk_bytes,
    )  # fmt: skip
    wants = Wants(needs_dhidden, needs_dweight, needs_dbias)
    gradients: Gradients = IMPLS[backend].backward(problem, drows_T, statistics, wants)
    return gradients


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


def _scaled(kept: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    # the last backward of this graph may have the memory; a tracer sees no graph to ask about
    last = type(dloss) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()
    if last and kept.dtype == dtype:
        return kept.detach().mul_(dloss)
    scaled: Tensor = _scale(kept, dloss, dtype)
    return scaled


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


def _autograd(ctx: Any, dloss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    wants = Wants(*ctx.needs_input_grad[:3])
    if dloss is None:
        return (None,) * 20
    if ctx.in_forward:
        kept = zip(wants, ctx.saved_tensors, ctx.dtypes, strict=True)
        found = [_scaled(tensor, dloss, dtype) if want else None for want, tensor, dtype in kept]
    else:
        gradients = _backward(dloss, *ctx.saved_tensors, *ctx.options, *wants, ctx.backend)
        found = [
            gradient if want else None for want, gradient in zip(wants, gradients, strict=True)
        ]
    return *found, *(None,) * 17


_forward.register_autograd(_autograd, setup_context=_setup_context)
