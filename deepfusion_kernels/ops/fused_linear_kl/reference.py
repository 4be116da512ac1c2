"""Distillation through two linear heads, logits whole, in float32 or float64.

s = hidden W^T + b,  x = s / tau,  q = softmax(x);   t, y, p alike for the teacher
forward_kl  KD = sum p (ln p - ln q)          dKD/dx = q - p
reverse_kl  KD = sum q (ln q - ln p)          dKD/dx = q (ln q - ln p - KD)
jsd         KD = beta KL(p|m) + (1-beta) KL(q|m),  m = beta p + (1-beta) q
                                              dKD/dx = (1-beta) q (v - sum q v),  v = ln q - ln m
CE   = logsumexp(s) - s[label]                dCE/ds = softmax(s) - onehot(label)
row  = scale (kd_weight KD + ce_weight CE)    dhidden = dS W,  dW = dS^T hidden,  db = sum_t dS
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..shared.kl_options import MISSING
from .problem import Gradients, Problem, Wants

# forward keeps nothing for backward
STATISTICS = 0


def forward(
    problem: Problem, wants: Wants, grad_weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Gradients]:
    """Rows [T] times their scale, empty statistics [T, 0], and the gradients of the rows' sum."""
    student_TV, teacher_TV = _logits(problem)
    rows_T = torch.zeros_like(problem.scale_T)
    if teacher_TV is not None:
        lnq_TV, lnp_TV = _compared(problem, student_TV, teacher_TV)
        rows_T = rows_T + problem.kd_scale * _divergence(lnq_TV, lnp_TV, problem)
    if problem.ce_weight:
        targets_T1, unknown_T1 = _targets(problem)
        chosen_T1 = student_TV.log_softmax(-1).gather(1, targets_T1) + unknown_T1
        rows_T = rows_T - problem.ce_weight * chosen_T1[:, 0]
    rows_T = torch.where(problem.scale_T != 0, problem.scale_T * rows_T, 0)
    wide = problem.wide
    gradients = _gradients(problem, torch.ones_like(rows_T), wants, (wide, grad_weight_dtype, wide))
    return rows_T, rows_T.new_empty((rows_T.shape[0], STATISTICS)), gradients


def backward(problem: Problem, drows_T: Tensor, statistics: Tensor, wants: Wants) -> Gradients:
    """Gradients for the upstream gradient [T] of the rows, in the dtypes of their inputs."""
    return _gradients(problem, drows_T, wants, problem.dtypes)


def _gradients(
    problem: Problem, drows_T: Tensor, wants: Wants, dtypes: tuple[torch.dtype, ...]
) -> Gradients:
    none = drows_T.new_empty(0)
    if not any(wants):
        return Gradients(*(none.to(dtype, copy=True) for dtype in dtypes))
    dstudent_TV = _dlogits(problem, drows_T)
    weight = problem.student_weight
    dhidden = dstudent_TV @ weight.to(problem.wide) if wants.hidden else none
    dweight = dstudent_TV.T @ _clean(problem.student_hidden, problem) if wants.weight else none
    dbias = dstudent_TV.sum(0) if wants.bias else none
    found = zip((dhidden, dweight, dbias), dtypes, strict=True)
    return Gradients(*(gradient.to(dtype, copy=gradient is none) for gradient, dtype in found))


def _dlogits(problem: Problem, drows_T: Tensor) -> Tensor:
    student_TV, teacher_TV = _logits(problem)
    scale_T1 = (drows_T * problem.scale_T)[:, None]
    dstudent_TV = torch.zeros_like(student_TV)
    if teacher_TV is not None:
        lnq_TV, lnp_TV = _compared(problem, student_TV, teacher_TV)
        c_T1 = scale_T1 * (problem.kd_scale / problem.temperature)
        dstudent_TV[:, : problem.compared] = c_T1 * _ddivergence(lnq_TV, lnp_TV, problem)
    if problem.ce_weight:
        targets_T1, unknown_T1 = _targets(problem)
        q_TV = student_TV.softmax(-1) + unknown_T1
        q_TV = q_TV.scatter_add(1, targets_T1, -torch.ones_like(q_TV[:, :1]))
        dstudent_TV = dstudent_TV + scale_T1 * problem.ce_weight * q_TV
    return torch.where(problem.scale_T[:, None] != 0, dstudent_TV, 0)


def _clean(hidden: Tensor, problem: Problem) -> Tensor:
    """Hidden states with masked rows as zeros, since 0 * NaN would reach the weight's gradient."""
    return torch.where(problem.scale_T[:, None] != 0, hidden.to(problem.wide), 0)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    logits = _clean(hidden, problem) @ weight.to(problem.wide).T
    logits = logits if bias is None else logits + bias.to(problem.wide)
    return torch.where(logits <= MISSING, -torch.inf, logits)


def _logits(problem: Problem) -> tuple[Tensor, Tensor | None]:
    student = _project(
        problem.student_hidden, problem.student_weight, problem.student_bias, problem
    )
    if problem.teacher_hidden is None or problem.teacher_weight is None or not problem.kd_scale:
        return student, None
    return student, _project(
        problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias, problem
    )


def _compared(problem: Problem, student_TV: Tensor, teacher_TV: Tensor) -> tuple[Tensor, Tensor]:
    """ln q and ln p over the columns that both heads have."""
    shared = slice(problem.compared)
    lnq_TV = (student_TV[:, shared] / problem.temperature).log_softmax(-1)
    return lnq_TV, (teacher_TV[:, shared] / problem.temperature).log_softmax(-1)


def _targets(problem: Problem) -> tuple[Tensor, Tensor]:
    """Labels [T, 1], 0 where masked or unknown; and what to add to a row: NaN where unknown."""
    assert problem.labels is not None, "the door lets ce_weight != 0 pass only with labels"
    V = problem.student_weight.shape[0]
    labels_T = torch.where(problem.scale_T != 0, problem.labels.long(), 0)
    known_T = (labels_T >= 0) & (labels_T < V)
    unknown_T = torch.where(known_T, 0.0, torch.nan).to(problem.wide)
    return torch.where(known_T, labels_T, 0)[:, None], unknown_T[:, None]


def _expectation(lnp_TV: Tensor, value_TV: Tensor) -> Tensor:
    """sum p value; a column of probability zero adds nothing, one that underflows keeps its inf."""
    terms_TV = torch.where(value_TV == torch.inf, torch.inf, lnp_TV.exp() * value_TV)
    return torch.where(lnp_TV == -torch.inf, 0, terms_TV).sum(-1)


def _difference(lnp_TV: Tensor, lnq_TV: Tensor) -> Tensor:
    """ln p - ln q, 0 where both are -inf."""
    return torch.where(lnp_TV == lnq_TV, 0, lnp_TV - lnq_TV)


def _mixture(lnq_TV: Tensor, lnp_TV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """w = ln(m/p) and v = ln(q/m), stable where q and p are many orders apart."""
    d_TV = _difference(lnq_TV, lnp_TV)
    e_TV = torch.expm1(-d_TV.abs())
    z_TV = torch.log1p(torch.where(d_TV >= 0, beta * e_TV, (1 - beta) * e_TV))
    w_TV = torch.where(d_TV >= 0, d_TV + z_TV, z_TV)
    return w_TV, torch.where(d_TV >= 0, -z_TV, d_TV - z_TV)


def _divergence(lnq_TV: Tensor, lnp_TV: Tensor, problem: Problem) -> Tensor:
    if problem.divergence == "forward_kl":
        return _expectation(lnp_TV, _difference(lnp_TV, lnq_TV))
    if problem.divergence == "reverse_kl":
        return _expectation(lnq_TV, _difference(lnq_TV, lnp_TV))
    w_TV, v_TV = _mixture(lnq_TV, lnp_TV, problem.beta)
    beta = problem.beta
    return (1 - beta) * _expectation(lnq_TV, v_TV) - beta * _expectation(lnp_TV, w_TV)


def _ddivergence(lnq_TV: Tensor, lnp_TV: Tensor, problem: Problem) -> Tensor:
    """dKD/dx."""
    q_TV = lnq_TV.exp()
    if problem.divergence == "forward_kl":
        return q_TV - lnp_TV.exp()
    if problem.divergence == "reverse_kl":
        value_TV, share = _difference(lnq_TV, lnp_TV), 1.0
    else:
        value_TV, share = _mixture(lnq_TV, lnp_TV, problem.beta)[1], 1 - problem.beta
    centred_TV = value_TV - _expectation(lnq_TV, value_TV)[:, None]
    return share * torch.where(lnq_TV == -torch.inf, 0, q_TV * centred_TV)
