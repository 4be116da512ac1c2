"""The meaning of kl_distillation in plain torch, forward and backward by formula: the law.

    d student: forward_kl c (q - p)
               reverse_kl c q (ln q - ln p - KD)    jsd c (1 - beta) q (ln(q / m) - KL(q | m))
    d teacher: forward_kl c p (ln p - ln q - KD)    jsd c beta p (ln(p / m) - KL(p | m))
               reverse_kl c (p - q)                 c = dloss kd_weight kappa / tau
    CE       : dloss ce_weight (softmax(s) - onehot)
    softcap b: the law is one of b tanh(s / b), its gradient times 1 - tanh(s / b)^2

Arithmetic in float32, or float64 where a side is float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..shared.kl_options import MISSING, wide_dtype
from .options import Options

# row statistics kept between forward and backward: none, the formulas start from the logits again
SAVED = 0


def _capped(logits_TV: Tensor, softcap: float) -> Tensor:
    """b tanh(s / b); missing logits stay missing."""
    if not softcap:
        return logits_TV
    return torch.where(logits_TV <= MISSING, logits_TV, softcap * torch.tanh(logits_TV / softcap))


def _through_cap(gradient: Tensor, logits: Tensor, softcap: float) -> Tensor:
    """The gradient of raw logits from that of capped ones: ds' / ds = 1 - (s' / b)^2."""
    if not softcap:
        return gradient
    share = torch.tanh(logits.to(gradient.dtype) / softcap)
    # a masked row may hold NaN, its gradient is 0 all the same
    return torch.where(gradient == 0, gradient, gradient * (1 - share * share))


def _log_softmax(logits_TV: Tensor, temperature: float) -> Tensor:
    """-inf where a logit is missing; NaN in a row missing whole, or with NaN or +inf in it."""
    present = logits_TV.masked_fill(logits_TV <= MISSING, -math.inf)
    return torch.log_softmax(present / temperature, -1)


def _log_ratio(ln_a: Tensor, ln_b: Tensor) -> Tensor:
    """ln a - ln b, or 0 where a = 0: what multiplies a in KL(a | b) and in its gradient."""
    return torch.where(ln_a == -math.inf, 0.0, ln_a - ln_b)


def _kl(ln_a: Tensor, ln_b: Tensor) -> Tensor:
    ratio = _log_ratio(ln_a, ln_b)
    # a may have underflowed to 0 where b is missing: the divergence is infinite all the same
    terms = torch.where(ratio == math.inf, math.inf, ln_a.exp() * ratio)
    return terms.sum(-1, keepdim=True)


def _log_mixture(ln_q: Tensor, ln_p: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(ln_p + math.log(beta), ln_q + math.log1p(-beta))


def _wide_rows(logits: Tensor, wide: torch.dtype, options: Options) -> Tensor:
    return _capped(logits.flatten(0, 1).to(wide), options.softcap)


def _log_probs(student: Tensor, teacher: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """ln q, ln p [T, V] over the shared columns."""
    V = min(student.shape[-1], teacher.shape[-1])
    wide = wide_dtype(student, teacher)
    s_TV, t_TV = (_wide_rows(side[..., :V], wide, options) for side in (student, teacher))
    return _log_softmax(s_TV, options.temperature), _log_softmax(t_TV, options.temperature)


def _divergence(ln_q: Tensor, ln_p: Tensor, options: Options) -> Tensor:
    if options.divergence == "forward_kl":
        return _kl(ln_p, ln_q)
    if options.divergence == "reverse_kl":
        return _kl(ln_q, ln_p)
    ln_m = _log_mixture(ln_q, ln_p, options.beta)
    return options.beta * _kl(ln_p, ln_m) + (1 - options.beta) * _kl(ln_q, ln_m)


def forward(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    keep: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """student [A, B, V_s], teacher [A, B, V_t], labels, keep [T], T = A B -> row loss [T]."""
    wide = wide_dtype(student, teacher)
    T, V_s = student.shape[0] * student.shape[1], student.shape[2]
    loss_T = student.new_zeros(T, dtype=wide)
    if teacher is not None:
        ln_q, ln_p = _log_probs(student, teacher, options)
        loss_T = loss_T + options.kd_scale * _divergence(ln_q, ln_p, options).squeeze(-1)
    if labels is not None:
        ln_1 = _log_softmax(_wide_rows(student, wide, options), 1.0)
        inside = (labels >= 0) & (labels < V_s)
        picked = ln_1.gather(-1, labels.clamp(0, V_s - 1)[:, None]).squeeze(-1)
        loss_T = loss_T - options.ce_weight * torch.where(inside, picked, math.nan)
    if keep is not None:
        loss_T = torch.where(keep, loss_T, 0.0)
    return loss_T, student.new_empty(T, SAVED, dtype=wide)


def _slopes(ln_q: Tensor, ln_p: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """d KD / d x and d KD / d y [T, V]."""
    q, p = ln_q.exp(), ln_p.exp()
    if options.divergence == "forward_kl":
        return q - p, p * (_log_ratio(ln_p, ln_q) - _kl(ln_p, ln_q))
    if options.divergence == "reverse_kl":
        return q * (_log_ratio(ln_q, ln_p) - _kl(ln_q, ln_p)), p - q
    beta, ln_m = options.beta, _log_mixture(ln_q, ln_p, options.beta)
    dx = (1 - beta) * q * (_log_ratio(ln_q, ln_m) - _kl(ln_q, ln_m))
    return dx, beta * p * (_log_ratio(ln_p, ln_m) - _kl(ln_p, ln_m))


def _place(slope_TV: Tensor, G_T: Tensor, keep: Tensor | None, like: Tensor) -> Tensor:
    """Scale rows, zero the masked, pad columns beyond the shared ones, in the shape of `like`."""
    gradient = slope_TV * G_T[:, None]
    if keep is not None:
        gradient = torch.where(keep[:, None], gradient, 0.0)
    beyond = like.shape[-1] - gradient.shape[-1]
    return torch.nn.functional.pad(gradient, (0, beyond)).view(like.shape)


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
    wide = wide_dtype(student, teacher)
    like = student if teacher is None else teacher
    dstudent = torch.zeros(
        student.shape if needs_dstudent else 0, dtype=wide, device=student.device
    )
    dteacher = torch.zeros(like.shape if needs_dteacher else 0, dtype=wide, device=like.device)
    if teacher is not None:
        dx, dy = _slopes(*_log_probs(student, teacher, options), options)
        c_T = dloss * (options.kd_scale / options.temperature)
        if needs_dstudent:
            dstudent = _place(dx, c_T, keep, student)
        if needs_dteacher:
            dteacher = _place(dy, c_T, keep, teacher)
    if labels is not None and needs_dstudent:
        V_s = student.shape[-1]
        probability = _log_softmax(_wide_rows(student, wide, options), 1.0).exp()
        onehot = torch.arange(V_s, device=student.device) == labels[:, None]
        inside = ((labels >= 0) & (labels < V_s))[:, None]
        slope = torch.where(inside, probability - onehot.to(wide), math.nan)
        dstudent = dstudent + _place(slope, dloss * options.ce_weight, keep, student)
    if needs_dstudent:
        dstudent = _through_cap(dstudent, student, options.softcap)
    if needs_dteacher:
        dteacher = _through_cap(dteacher, like, options.softcap)
    return dstudent.to(student.dtype), dteacher.to(like.dtype)
