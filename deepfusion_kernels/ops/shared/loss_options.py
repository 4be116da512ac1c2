"""What the doors of the distillation losses ask of their options, and the weight of each row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checks import FLOATS, INTEGERS, expect_option, expect_that

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
REDUCTIONS = ("mean", "sum", "none")


def resolve_divergence(divergence: str, beta: float) -> str:
    """jsd with beta 0 or 1 is, by convention, forward or reverse KL."""
    if divergence == "jsd" and beta in (0.0, 1.0):
        return "reverse_kl" if beta else "forward_kl"
    return divergence


def expect_loss_options(
    op: str,
    divergence: str,
    beta: float,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    labels: Tensor | None,
    reduction: str,
) -> None:
    """Raises ValueError for an option outside the limits of docs/ops/kl_distillation.md."""
    expect_option(divergence, op, "divergence", DIVERGENCES)
    expect_option(reduction, op, "reduction", REDUCTIONS)
    expect_that(0.0 <= beta <= 1.0, op, "beta", "in [0, 1]", beta)
    usable = math.isfinite(temperature) and temperature >= 1e-6
    expect_that(usable, op, "temperature", "finite and >= 1e-6", temperature)
    expect_that(math.isfinite(kd_weight), op, "kd_weight", "finite", kd_weight)
    expect_that(math.isfinite(ce_weight), op, "ce_weight", "finite", ce_weight)
    both = f"kd_weight = {kd_weight}, ce_weight = {ce_weight}"
    expect_that(kd_weight != 0 or ce_weight != 0, op, "kd_weight or ce_weight", "not 0", both)
    expect_that(not ce_weight or labels is not None, op, "labels", "given for ce_weight != 0", "None")


def expect_rows(tensor: Tensor, op: str, argument: str, lead: torch.Size, like: Tensor) -> None:
    """Raises ValueError unless the tensor holds one number for each token: int for labels, else float."""
    same = tensor.shape == lead
    expect_that(same, op, argument, f"[...] = {list(lead)}", list(tensor.shape))
    kinds = INTEGERS if argument == "labels" else FLOATS
    wanted = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
    expect_that(tensor.dtype in kinds, op, argument, wanted, tensor.dtype)
    expect_that(tensor.device == like.device, op, argument, f"on {like.device}", tensor.device)
    if argument == "row_weight":
        expect_that(not tensor.requires_grad, op, argument, "detached", "requires_grad")


def row_scale(
    like: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    wide: torch.dtype,
) -> Tensor:
    """What each row's loss is multiplied by, [T]: its weight, over their sum for 'mean'; 0 masks it."""
    T = like.shape[0]
    if row_weight is None:
        scale_T = torch.ones(T, dtype=wide, device=like.device)
    else:
        scale_T = row_weight.detach().reshape(T).to(wide)
    if labels is not None:
        scale_T = torch.where(labels.reshape(T) == ignore_index, 0, scale_T)
    if reduction == "mean":
        total = scale_T.sum()
        scale_T = torch.where(total > 0, scale_T / total, 0)
    return scale_T


def refuse_unknown_labels(labels: Tensor, scale_T: Tensor, V: int, op: str) -> None:
    """Raises ValueError for a label that names no column; on a GPU that row is NaN instead: no sync."""
    if labels.device.type != "cpu":
        return
    outside_T = (scale_T != 0) & ((labels < 0) | (labels >= V))
    if bool(outside_T.any()):
        worst = int(labels[outside_T][0])
        raise ValueError(f"{op}: labels must be in [0, {V}) or ignore_index, got {worst}")
