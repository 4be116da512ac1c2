"""What the kernels are timed against: plain torch, spelled as a user would.

A function `<peer>_<door>` takes the door's arguments; benchmarks/run.py finds it by its name, and
times `eager` through torch.compile as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_kl_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """log_softmax of both sides in float32, then F.kl_div; no division where temperature is 1."""
    scores = [logits.float() for logits in (student_logits, teacher_logits)]
    if temperature != 1.0:
        scores = [score / temperature for score in scores]
    ln_q, ln_p = (F.log_softmax(score, -1) for score in scores)
    if divergence == "forward_kl":
        loss = F.kl_div(ln_q, ln_p, reduction="none", log_target=True).sum(-1)
    elif divergence == "reverse_kl":
        loss = F.kl_div(ln_p, ln_q, reduction="none", log_target=True).sum(-1)
    else:
        ln_m = torch.logaddexp(ln_p + math.log(beta), ln_q + math.log1p(-beta))
        of_p = F.kl_div(ln_m, ln_p, reduction="none", log_target=True).sum(-1)
        of_q = F.kl_div(ln_m, ln_q, reduction="none", log_target=True).sum(-1)
        loss = beta * of_p + (1 - beta) * of_q
    if labels is not None:
        loss = loss * (labels != -100)
        ce = F.cross_entropy(student_logits.float(), labels, reduction="none")
        loss = loss + ce_weight * ce
    if reduction == "none":
        return loss
    rows = loss.numel() if labels is None else (labels != -100).sum()
    return loss.sum() if reduction == "sum" else loss.sum() / rows


def eager_fused_linear_kl_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    chunk_bytes: int | None = None,
    **options: Any,
) -> Tensor:
    """Both heads' logits whole in the input dtype, then the eager losses in float32."""
    student = student_hidden @ student_weight.T
    if teacher_hidden is None or teacher_weight is None:
        return ce_weight * F.cross_entropy(student.float(), labels)
    teacher = teacher_hidden @ teacher_weight.T
    options["ce_weight"] = ce_weight / kd_weight
    return kd_weight * eager_kl_distillation(student, teacher, labels, **options)


def eager_topk_kl_distillation(
    student_logits: Tensor, teacher_ids: Tensor, teacher_logprobs: Tensor
) -> Tensor:
    """forward_kl over the kept tokens and one bucket of the rest, temperature 1, mean."""
    ln_q = F.log_softmax(student_logits.float(), -1).gather(-1, teacher_ids)
    sides = []
    for ln in (ln_q, teacher_logprobs.float()):
        rest = (1 - ln.exp().sum(-1, keepdim=True)).clamp(min=2.0**-24).log()
        sides.append(torch.cat([ln, rest], -1))
    return F.kl_div(*sides, reduction="none", log_target=True).sum(-1).mean()


def _in_best_groups(
    choice: Tensor, num_groups: int, top_groups: int | None, group_score: str
) -> Tensor:
    """-inf outside the best groups, as DeepSeek's routers mask them."""
    T, E = choice.shape
    grouped = choice.view(T, num_groups, E // num_groups)
    best = grouped.topk(2 if group_score == "top2_sum" else 1, dim=-1).values.sum(-1)
    kept = torch.zeros_like(best).scatter_(1, best.topk(top_groups or 1, dim=-1).indices, 1.0)
    return grouped.masked_fill(kept[..., None] == 0, -math.inf).view(T, E)


def eager_moe_route(
    router_logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
    selection_bias: Tensor | None = None,
    num_groups: int | None = None,
    top_groups: int | None = None,
    group_score: str = "max",
    balance_loss_weight: float = 0.0,
    z_loss_weight: float = 0.0,
) -> tuple[Tensor, ...]:
    """Scores of every expert, torch.topk, losses by one-hot as transformers has them."""
    z = router_logits.float()
    E = z.shape[1]
    scores = z.sigmoid() if score == "sigmoid" else z.softmax(-1)
    choice = scores.detach() if selection_bias is None else scores.detach() + selection_bias
    if num_groups is not None:
        choice = _in_best_groups(choice, num_groups, top_groups, group_score)
    experts = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    aux = z.new_zeros(())
    share = F.one_hot(experts, E).float().sum(1).mean(0)
    if balance_loss_weight:
        mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
        aux = aux + balance_loss_weight * E * (share * mean).sum()
    if z_loss_weight:
        aux = aux + z_loss_weight * z.logsumexp(-1).square().mean()
    return weights * scale, experts, aux


def eager_moe_plan(experts: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    """argsort, its inverse and bincount, which asks the host for the largest id."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    slots = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.numel(), device=order.device)
    )
    return order, slots.view_as(experts), flat.bincount(minlength=num_experts).cumsum(0)


def eager_moe_dispatch(hidden: Tensor, plan: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Indexing; every slot has an expert."""
    order, slots, _ = plan
    return hidden[order // slots.shape[1]]


def eager_moe_combine(rows: Tensor, plan: tuple[Tensor, Tensor, Tensor], weights: Tensor) -> Tensor:
    """Rows back in their slots, weighted, summed; every slot has an expert."""
    slots = plan[1]
    return (rows[slots] * weights[..., None].to(rows.dtype)).sum(1)


def eager_moe_experts(
    hidden: Tensor, gate_up_proj: Tensor, down_proj: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """One expert after the other, as transformers' own loop does it."""
    out = torch.zeros_like(hidden)
    for expert in range(gate_up_proj.shape[0]):
        token, choice = torch.where(experts == expert)
        gate, up = F.linear(hidden[token], gate_up_proj[expert]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, down_proj[expert]) * weights[token, choice, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


class _Experts:
    """What transformers' experts look at; a class, since torch.compile knows no namespace."""

    has_gate, has_bias, is_transposed = True, False, False

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.num_experts = gate_up_proj.shape[0]

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up


def grouped_mm_moe_experts(
    hidden: Tensor, gate_up_proj: Tensor, down_proj: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """The implementation that transformers chooses by default."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    out: Tensor = grouped_mm_experts_forward(
        _Experts(gate_up_proj, down_proj), hidden, experts, weights
    )
    return out


def eager_orthogonalise(matrices: Tensor) -> Tensor:
    """torch.optim.Muon's own rounds, matrix by matrix, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    rows = []
    for matrix in matrices:
        tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.bfloat16().t() if tall else matrix.bfloat16()
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.t()
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        rows.append(x.t() if tall else x)
    return torch.stack(rows)
