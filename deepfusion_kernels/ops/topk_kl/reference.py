"""Distillation from the K kept tokens of each teacher row, in float32 or float64.

q = softmax(s / tau),  S the kept ids,  P_S = sum_S p,  o = everything outside S
bucket       divergence between (p_S, p_o) and (q_S, q_o),  p_o = 1 - P_S,  q_o = 1 - sum_S q
             on S: H_k - q_k H,  off S: q_i (H_o / q_o - H),  H = sum H_k
zero         sum_S p (ln p - ln q);              on S: P_S q - p,  off S: P_S q
renormalize  divergence between softmax_S(ln p) and softmax_S(s / tau); on S: H_k - q_k H, off S: 0
H_k          forward_kl -p_k;  reverse_kl q_k (ln q_k - ln p_k - KD);
                 jsd (1 - beta) q_k (v_k - K_s),  v = ln(q/m),  K_s = sum q v
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..shared.kl_options import MISSING
from .problem import FLOOR, Problem

# forward keeps nothing for backward
STATISTICS = 0


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Rows [T] times their scale, and the empty statistics [T, 0]."""
    logits_TV = _logits(problem)
    rows_T = torch.zeros_like(problem.scale_T)
    if problem.kd_scale:
        lnq_TK, lnp_TK, *_ = _outcomes(problem, logits_TV)
        rows_T = rows_T + problem.kd_scale * _divergence(lnq_TK, lnp_TK, problem)
    if problem.ce_weight:
        targets_T1, unknown_T1 = _targets(problem)
        chosen_T1 = logits_TV.log_softmax(-1).gather(1, targets_T1) + unknown_T1
        rows_T = rows_T - problem.ce_weight * chosen_T1[:, 0]
    rows_T = torch.where(problem.scale_T != 0, problem.scale_T * rows_T, 0)
    return rows_T, rows_T.new_empty((rows_T.shape[0], STATISTICS))


def backward(problem: Problem, drows_T: Tensor, statistics: Tensor) -> Tensor:
    """Gradient [A, B, V] in the logits' dtype."""
    logits_TV = _logits(problem)
    scale_T1 = (drows_T * problem.scale_T)[:, None]
    dlogits_TV = torch.zeros_like(logits_TV)
    if problem.kd_scale:
        dlogits_TV = (
            scale_T1 * (problem.kd_scale / problem.temperature) * _slopes(problem, logits_TV)
        )
    if problem.ce_weight:
        targets_T1, unknown_T1 = _targets(problem)
        q_TV = logits_TV.softmax(-1) + unknown_T1
        q_TV = q_TV.scatter_add(1, targets_T1, -torch.ones_like(q_TV[:, :1]))
        dlogits_TV = dlogits_TV + scale_T1 * problem.ce_weight * q_TV
    dlogits_TV = torch.where(problem.scale_T[:, None] != 0, dlogits_TV, 0)
    return dlogits_TV.to(problem.student_ABV.dtype).reshape(problem.student_ABV.shape)


def select(logits_TV: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [T, k] of the largest logits of each row, largest first."""
    wide = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    present_TV = torch.where(logits_TV <= MISSING, -torch.inf, logits_TV.to(wide))
    # a stable sort: of equal logits the smaller id comes first
    ids_TK = present_TV.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids_TK, (present_TV / temperature).log_softmax(-1).gather(1, ids_TK)


def _logits(problem: Problem) -> Tensor:
    V = problem.student_ABV.shape[-1]
    logits_TV = problem.student_ABV.reshape(problem.scale_T.shape[0], V).to(problem.wide)
    return torch.where(logits_TV <= MISSING, -torch.inf, logits_TV)


def _targets(problem: Problem) -> tuple[Tensor, Tensor]:
    """Labels [T, 1], 0 where masked or unknown; and what to add to a row: NaN where unknown."""
    assert problem.labels is not None, "the door lets ce_weight != 0 pass only with labels"
    V = problem.student_ABV.shape[-1]
    labels_T = torch.where(problem.scale_T != 0, problem.labels.long(), 0)
    known_T = (labels_T >= 0) & (labels_T < V)
    unknown_T = torch.where(known_T, 0.0, torch.nan).to(problem.wide)
    return torch.where(known_T, labels_T, 0)[:, None], unknown_T[:, None]


def _kept(problem: Problem) -> tuple[Tensor, Tensor]:
    """Which entries count, and their ids: the first of each id within the vocabulary."""
    ids_TK = problem.ids_TK.long()
    sorted_TK, order_TK = ids_TK.sort(dim=1, stable=True)
    repeats_TK = torch.zeros_like(ids_TK, dtype=torch.bool)
    repeats_TK[:, 1:] = sorted_TK[:, 1:] == sorted_TK[:, :-1]
    repeats_TK = torch.zeros_like(repeats_TK).scatter(1, order_TK, repeats_TK)
    inside_TK = (ids_TK >= 0) & (ids_TK < problem.student_ABV.shape[-1])
    kept_TK = inside_TK & ~repeats_TK
    return kept_TK, torch.where(kept_TK, ids_TK, 0)


def _rest(ln_TK: Tensor) -> Tensor:
    """ln of the mass outside, [T, 1]."""
    return (-torch.expm1(ln_TK.logsumexp(1, keepdim=True))).clamp(min=FLOOR).log()


def _outcomes(problem: Problem, logits_TV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ln q and ln p of the outcomes compared (the bucket last), what was kept, and its ids.

    Padding is an outcome of probability zero on both sides.
    """
    kept_TK, ids_TK = _kept(problem)
    lnp_TK = torch.where(kept_TK, problem.logprobs_TK.to(problem.wide), -torch.inf)
    x_TV = logits_TV / problem.temperature
    x_TV = x_TV if problem.tail == "renormalize" else x_TV.log_softmax(-1)
    lnq_TK = torch.where(kept_TK, x_TV.gather(1, ids_TK), -torch.inf)
    if problem.tail == "bucket":
        lnq_TK, lnp_TK = (torch.cat([ln, _rest(ln)], 1) for ln in (lnq_TK, lnp_TK))
    elif problem.tail == "renormalize":
        # a row of padding alone has no distribution, and no loss
        some_T1 = kept_TK.any(1, keepdim=True)
        lnq_TK, lnp_TK = (
            torch.where(some_T1, ln.log_softmax(1), -torch.inf) for ln in (lnq_TK, lnp_TK)
        )
    return lnq_TK, lnp_TK, kept_TK, ids_TK


def _expectation(lnp_TK: Tensor, value_TK: Tensor) -> Tensor:
    """sum p value; an outcome of probability zero adds nothing, one that underflows keeps inf."""
    terms_TK = torch.where(value_TK == torch.inf, torch.inf, lnp_TK.exp() * value_TK)
    return torch.where(lnp_TK == -torch.inf, 0, terms_TK).sum(-1)


def _difference(lnp_TK: Tensor, lnq_TK: Tensor) -> Tensor:
    """ln p - ln q, 0 where both are -inf."""
    return torch.where(lnp_TK == lnq_TK, 0, lnp_TK - lnq_TK)


def _mixture(lnq_TK: Tensor, lnp_TK: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """w = ln(m/p) and v = ln(q/m), stable where q and p are many orders apart."""
    d_TK = _difference(lnq_TK, lnp_TK)
    e_TK = torch.expm1(-d_TK.abs())
    z_TK = torch.log1p(torch.where(d_TK >= 0, beta * e_TK, (1 - beta) * e_TK))
    w_TK = torch.where(d_TK >= 0, d_TK + z_TK, z_TK)
    return w_TK, torch.where(d_TK >= 0, -z_TK, d_TK - z_TK)


def _divergence(lnq_TK: Tensor, lnp_TK: Tensor, problem: Problem) -> Tensor:
    if problem.divergence == "forward_kl":
        return _expectation(lnp_TK, _difference(lnp_TK, lnq_TK))
    if problem.divergence == "reverse_kl":
        return _expectation(lnq_TK, _difference(lnq_TK, lnp_TK))
    w_TK, v_TK = _mixture(lnq_TK, lnp_TK, problem.beta)
    beta = problem.beta
    return (1 - beta) * _expectation(lnq_TK, v_TK) - beta * _expectation(lnp_TK, w_TK)


def _slopes(problem: Problem, logits_TV: Tensor) -> Tensor:
    """dKD / d(s / tau)."""
    lnq_TK, lnp_TK, kept_TK, ids_TK = _outcomes(problem, logits_TV)
    q_TK, p_TK = lnq_TK.exp(), lnp_TK.exp()
    q_TV = (logits_TV / problem.temperature).softmax(-1)
    if problem.tail == "zero":
        mass_T1 = p_TK.sum(1, keepdim=True)
        on_TK, off_TV = mass_T1 * q_TK - p_TK, mass_T1 * q_TV
    else:
        h_TK = _h(lnq_TK, lnp_TK, problem)
        h_T1 = h_TK.sum(1, keepdim=True)
        on_TK, off_TV = h_TK - q_TK * h_T1, torch.zeros_like(q_TV)
        if problem.tail == "bucket":
            off_TV = q_TV * (h_TK[:, -1:] / q_TK[:, -1:] - h_T1)
    on_TK = torch.where(kept_TK, on_TK[:, : kept_TK.shape[1]], 0)
    empty_TV = torch.zeros_like(q_TV)
    is_on_TV = empty_TV.scatter_add(1, ids_TK, kept_TK.to(q_TV.dtype)) > 0
    return torch.where(is_on_TV, empty_TV.scatter_add(1, ids_TK, on_TK), off_TV)


def _h(lnq_TK: Tensor, lnp_TK: Tensor, problem: Problem) -> Tensor:
    if problem.divergence == "forward_kl":
        return -lnp_TK.exp()
    if problem.divergence == "reverse_kl":
        value_TK, share = _difference(lnq_TK, lnp_TK), 1.0
    else:
        value_TK, share = _mixture(lnq_TK, lnp_TK, problem.beta)[1], 1 - problem.beta
    centred_TK = value_TK - _expectation(lnq_TK, value_TK)[:, None]
    return share * torch.where(lnq_TK == -torch.inf, 0, lnq_TK.exp() * centred_TK)
