"""The likelihood of one span of text under two tokenizations, as the odds of one yes or no.

l_S, l_T  = sums of the span's token log-probabilities, at most -1e-6
a, b      = e^(l_S/tau), e^(l_T/tau)
loss_c    = tau [ b ln(b/a) + (1-b) ln((1-b)/(1-a)) ]
dl_S      = dloss (a - b) / (1 - a)  =  dloss a expm1((l_T - l_S)/tau) / expm1(l_S/tau)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import expect, expect_option, expect_that
from ..cross_tokenizer.tables import span_of_tokens
from ..ops.shared.kl_options import REDUCTIONS, check_rows, reduce_rows, wide_dtype

OP = "alm_distillation"
# a span this sure has no odds to compare
SUREST = -1e-6


def alm_distillation(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    student_spans: Tensor,
    teacher_spans: Tensor,
    *,
    temperature: float = 100.0,
    span_weight: Tensor | None = None,
    scale_by_temperature: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Approximate likelihood matching over the spans of text that two tokenizations share.

    student_logprobs [B, L_s], teacher_logprobs [B, L_t] float: ln p of token t at place t;
    spans [B, C, 2] int64 of tokens as [start, end), starts not falling, an empty one is left out;
    span_weight [B, C], 0 masks a span -> float32 (float64 for float64) scalar, or [B, C] for
    reduction 'none'. scale_by_temperature keeps the factor tau, without which the loss vanishes as
    1/tau. Raises ValueError naming the argument; RuntimeError for a second derivative.
    Source: arXiv 2503.20083, equation 4, with f the binary KL.
    """
    fits = 1e-6 <= temperature < math.inf
    expect_that(fits, OP, "temperature", "finite and >= 1e-6", temperature)
    expect_option(reduction, OP, "reduction", REDUCTIONS)
    B, _ = expect(student_logprobs, OP, "student_logprobs", "B L_s")
    expect(teacher_logprobs, OP, "teacher_logprobs", "B L_t", B=B, like=student_logprobs)
    C = _spans(student_spans, "student_spans", student_logprobs, B=B, two=2)
    _spans(teacher_spans, "teacher_spans", student_logprobs, B=B, C=C, two=2)
    asks = torch.is_grad_enabled() and teacher_logprobs.requires_grad
    expect_that(not asks, OP, "teacher_logprobs", "detached", "requires_grad; pass .detach()")
    wide = wide_dtype(student_logprobs, teacher_logprobs)
    holds_BC = (student_spans.diff(dim=2) > 0) & (teacher_spans.diff(dim=2) > 0)
    weight_BC = holds_BC[..., 0].to(wide)
    if span_weight is not None:
        weight_BC = weight_BC * span_weight
    rows = check_rows(OP, student_logprobs.new_empty(B, C, 0), None, weight_BC, 0, 0.0)
    keep_BC = weight_BC != 0
    student_BC = _span_sums(student_logprobs, student_spans, keep_BC)
    teacher_BC = _span_sums(teacher_logprobs, teacher_spans, keep_BC)
    loss_BC = _odds(student_BC, teacher_BC, temperature)
    scale = 1.0 if scale_by_temperature else 1 / temperature
    loss_T = torch.where(keep_BC, loss_BC.to(wide) * scale, 0).flatten()
    return reduce_rows(loss_T, rows, reduction, (B, C))


def _spans(spans: Tensor, argument: str, like: Tensor, **sizes: int) -> int:
    """C of spans [B, C, 2]."""
    return expect(spans, OP, argument, "B C two", dtype=torch.int64, like=like, **sizes)[1]


def _span_sums(logprobs_BL: Tensor, spans_BC2: Tensor, keep_BC: Tensor) -> Tensor:
    """Sum over every span's own tokens, [B, C] float64, at most SUREST; masked spans are -1.

    float64: near 1 the odds are differences, and there are few spans.
    """
    (B, L), C = logprobs_BL.shape, spans_BC2.shape[1]
    owner_BL = span_of_tokens(spans_BC2, L)
    kept_BL = torch.nn.functional.pad(keep_BC, (0, 1)).gather(1, owner_BL)
    wide_BL = torch.where(kept_BL, logprobs_BL, 0).double()
    sums_BC = wide_BL.new_zeros(B, C + 1).scatter_add(1, owner_BL, wide_BL)[:, :C]
    return torch.where(keep_BC, sums_BC, -1).clamp(max=SUREST)


@torch.library.custom_op("deepfusion::alm", mutates_args=())
def _odds(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    x_BC, y_BC = student_BC / temperature, teacher_BC / temperature
    b_BC = y_BC.exp()
    ours_BC = torch.where(b_BC > 0, b_BC * (y_BC - x_BC), 0)
    rest_BC = torch.expm1(y_BC) / torch.expm1(x_BC)
    return temperature * (ours_BC - torch.expm1(y_BC) * rest_BC.log()).clamp(min=0)


@_odds.register_fake
def _(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(student_BC)


@torch.library.custom_op("deepfusion::alm_backward", mutates_args=())
def _odds_backward(
    dloss_BC: Tensor, student_BC: Tensor, teacher_BC: Tensor, temperature: float
) -> Tensor:
    x_BC, y_BC = student_BC / temperature, teacher_BC / temperature
    return dloss_BC * (x_BC.exp() * torch.expm1(y_BC - x_BC) / torch.expm1(x_BC))


@_odds_backward.register_fake
def _(dloss_BC: Tensor, student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(student_BC)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.temperature = inputs[2]


def _autograd(ctx: Any, dloss_BC: Tensor) -> tuple[Tensor | None, ...]:
    return _odds_backward(dloss_BC, *ctx.saved_tensors, ctx.temperature), None, None


_odds.register_autograd(_autograd, setup_context=_setup_context)
