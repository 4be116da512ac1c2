"""Distillation of logits as a user spells it with torch's own functions: the second spelling.

In float64 it checks the reference; in the input's dtype it is the eager side of the error budget.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Row losses [...] by F.kl_div and F.cross_entropy; 0 where the label is ignore_index."""
    V = min(student.shape[-1], teacher.shape[-1])
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    ln_q = F.log_softmax(student[..., :V].to(wide) / temperature, -1)
    ln_p = F.log_softmax(teacher[..., :V].to(wide) / temperature, -1)

    def kl(ln_a: Tensor, ln_b: Tensor) -> Tensor:
        return F.kl_div(ln_b, ln_a, reduction="none", log_target=True).sum(-1)

    if divergence == "forward_kl" or (divergence == "jsd" and beta == 0):
        kd = kl(ln_p, ln_q)
    elif divergence == "reverse_kl" or (divergence == "jsd" and beta == 1):
        kd = kl(ln_q, ln_p)
    else:
        ln_m = torch.logaddexp(ln_p + math.log(beta), ln_q + math.log(1 - beta))
        kd = beta * kl(ln_p, ln_m) + (1 - beta) * kl(ln_q, ln_m)
    kappa = temperature**2 if scale_by_temperature_squared else 1.0
    rows = kd_weight * kappa * kd
    if labels is not None:
        flat = student.flatten(0, -2).to(wide)
        ce = F.cross_entropy(
            flat, labels.flatten().long(), ignore_index=ignore_index, reduction="none"
        )
        rows = rows + ce_weight * ce.view_as(rows)
        rows = torch.where(labels != ignore_index, rows, 0.0)
    return rows


def gradient_floor(
    student: Tensor, teacher: Tensor, truth: Tensor, dloss: Tensor, unit: float, **options: Any
) -> Tensor:
    """u max|truth| + 4e-6 c max(p, q) max(1, KD), and the same of CE's softmax.

    q - p is a difference of probabilities known to about 1e-6; p (ln p - ln q - KD) multiplies one
    by a difference of logarithms of KD's size.
    """
    tau, V = options.get("temperature", 1.0), min(student.shape[-1], teacher.shape[-1])
    kappa = tau**2 if options.get("scale_by_temperature_squared") else 1.0
    c = (dloss.double() * options.get("kd_weight", 1.0) * kappa / tau).abs()[..., None]
    q = torch.softmax(student[..., :V].double() / tau, -1)
    p = torch.softmax(teacher[..., :V].double() / tau, -1)
    beyond = truth.shape[-1] - V
    kd = (p * (p.log() - q.log())).sum(-1, keepdim=True).clamp(min=1)
    if options.get("divergence") == "reverse_kl":
        kd = (q * (q.log() - p.log())).sum(-1, keepdim=True).clamp(min=1)
    floor = F.pad(c * torch.maximum(p, q) * kd.nan_to_num(1.0, 1.0), (0, beyond))
    if options.get("ce_weight"):
        g = (dloss.double() * options["ce_weight"]).abs()[..., None]
        of_ce = g * torch.softmax(student.double(), -1)
        if of_ce.shape == floor.shape:
            floor = floor + of_ce
    finite = truth[truth.isfinite()]
    return (unit * finite.abs().max() + 4e-6 * floor)[truth.isfinite()]
