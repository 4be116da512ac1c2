"""What the doors of the distillation ops share: options, masked rows, reduction.

row_t  = kd_weight * kappa * KD_t + ce_weight * CE_t     0 where masked
kappa  = tau^2 if scale_by_temperature_squared else 1
'mean' : sum_t row_weight_t row_t / n,   n = unmasked rows, or their row_weight summed
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import INTEGERS, expect, expect_option, expect_that

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
REDUCTIONS = ("mean", "sum", "none")
VOCAB_ALIGNS = ("error", "truncate")

# raw logits at or below count as -inf: the masks made of finfo.min of any float type are
MISSING = -1e30


class KLOptions(NamedTuple):
    """One row's mathematics: KD_t times kd_scale = kd_weight * kappa, plus CE_t times ce_weight."""

    divergence: str
    beta: float
    temperature: float
    kd_scale: float
    ce_weight: float

    @property
    def with_kd(self) -> bool:
        return self.kd_scale != 0.0

    @property
    def with_ce(self) -> bool:
        return self.ce_weight != 0.0


def kl_options(
    op: str,
    divergence: str,
    beta: float,
    temperature: float,
    scale_by_temperature_squared: bool,
    kd_weight: float,
    ce_weight: float,
) -> KLOptions:
    """Check the options of a door; 'jsd' at beta 0 or 1 becomes the KL it names.

    Raises ValueError naming the option, what was wanted and what was got.
    """
    expect_option(divergence, op, "divergence", DIVERGENCES)
    expect_that(
        1e-6 <= temperature < math.inf, op, "temperature", "finite and >= 1e-6", temperature
    )
    expect_that(0.0 <= beta <= 1.0, op, "beta", "in [0, 1]", beta)
    expect_that(abs(kd_weight) < math.inf, op, "kd_weight", "finite", kd_weight)
    expect_that(abs(ce_weight) < math.inf, op, "ce_weight", "finite", ce_weight)
    expect_that(
        kd_weight != 0.0 or ce_weight != 0.0, op, "kd_weight and ce_weight", "not both 0", "0 and 0"
    )
    if divergence == "jsd" and beta == 0.0:
        divergence = "forward_kl"
    elif divergence == "jsd" and beta == 1.0:
        divergence = "reverse_kl"
    kappa = temperature * temperature if scale_by_temperature_squared else 1.0
    return KLOptions(divergence, beta, temperature, kd_weight * kappa, ce_weight)


def wide_dtype(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    """What losses and statistics are kept in: float64 if either side is, else float32."""
    sides = (student, student if teacher is None else teacher)
    return torch.float64 if any(s.dtype == torch.float64 for s in sides) else torch.float32


class Rows(NamedTuple):
    """The per-row arguments of a door, flattened; None where the caller gave none."""

    labels_T: Tensor | None
    weight_T: Tensor | None
    keep_T: Tensor | None


def check_rows(
    op: str,
    logits: Tensor,
    labels: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int,
    ce_weight: float,
) -> Rows:
    """Flatten labels and row_weight [...] beside `logits` [..., C] and say which rows count.

    Raises ValueError for shapes, dtypes, devices, or CE without labels.
    """
    leading = tuple(logits.shape[:-1])
    expect_that(
        ce_weight == 0.0 or labels is not None, op, "labels", "given when ce_weight != 0", None
    )
    labels_T = weight_T = keep_T = None
    if labels is not None:
        expect(labels, op, "labels", "...", dtype=INTEGERS, like=logits)
        expect_that(
            tuple(labels.shape) == leading, op, "labels", f"{list(leading)}", list(labels.shape)
        )
        labels_T = labels.reshape(-1).to(torch.int64)
        keep_T = labels_T != ignore_index
    if row_weight is not None:
        expect(row_weight, op, "row_weight", "...", like=logits)
        got = list(row_weight.shape)
        expect_that(tuple(row_weight.shape) == leading, op, "row_weight", f"{list(leading)}", got)
        expect_that(
            not row_weight.requires_grad, op, "row_weight", "without gradient", "requires_grad"
        )
        weight_T = row_weight.reshape(-1)
        weighs = weight_T != 0
        keep_T = weighs if keep_T is None else keep_T & weighs
    return Rows(labels_T, weight_T, keep_T)


def refuse_bad_labels(op: str, labels_T: Tensor | None, keep_T: Tensor | None, V: int) -> None:
    """Raise ValueError for an unmasked label outside [0, V) on the CPU; on CUDA its row is NaN."""
    if labels_T is None or labels_T.device.type != "cpu":
        return
    bad = (labels_T < 0) | (labels_T >= V)
    if keep_T is not None:
        bad &= keep_T
    if bool(bad.any()):
        row = int(bad.int().argmax())
        wanted = f"in [0, V_s) = [0, {V}) or ignore_index"
        expect_that(False, op, "labels", wanted, f"{int(labels_T[row])} in row {row}")


def reduce_rows(loss_T: Tensor, rows: Rows, reduction: str, leading: tuple[int, ...]) -> Tensor:
    """Weighted row losses [T] to a scalar or [...]; n = 0 gives 0, never NaN."""
    weight_T = None if rows.weight_T is None else rows.weight_T.to(loss_T.dtype)
    if weight_T is not None:
        loss_T = loss_T * weight_T
    if reduction == "none":
        return loss_T.reshape(leading)
    total = loss_T.sum()
    if reduction == "sum":
        return total
    if rows.keep_T is None:
        return total / max(loss_T.shape[0], 1)
    counted_T = rows.keep_T.to(loss_T.dtype)
    n = (counted_T if weight_T is None else counted_T * weight_T).sum()
    return total / torch.where(n > 0, n, torch.ones_like(n))
