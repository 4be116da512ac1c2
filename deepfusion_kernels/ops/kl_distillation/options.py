"""What one row of kl_distillation needs to know beyond its logits."""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """kd_scale = kd_weight kappa; softcap b puts b tanh(s / b) for both sides' logits, 0 none."""

    divergence: str
    beta: float
    temperature: float
    kd_scale: float
    ce_weight: float
    softcap: float
