"""One matrix a thread in C++; bfloat16 products where the processor has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import QUINTIC, ROUNDS


def declines(
    name: str, tensor: Tensor, in_place: Sequence[Tensor] = (), **facts: Any
) -> str | None:
    """Why this backend cannot serve, or None."""
    for one in (tensor, *in_place):
        if one.dtype != torch.float32:
            return f"needs float32, got {one.dtype}"
    if not all(one.is_contiguous() for one in in_place):
        return "needs contiguous parameters and momenta"
    return None


def forward(matrices_NAB: Tensor) -> Tensor:
    """As reference.forward."""
    matrices_NAB = matrices_NAB.contiguous()
    out_NAB = torch.empty_like(matrices_NAB)
    torch.ops.deepfusion_native.orthogonalise(matrices_NAB, out_NAB, ROUNDS, *QUINTIC)
    return out_NAB


def muon_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
    rms: float,
) -> None:
    """As reference.muon_step; every matrix is read and written once."""
    whole = [gradient.contiguous() for gradient in gradients]
    torch.ops.deepfusion_native.muon_step(
        parameters, whole, momenta, ROUNDS, *QUINTIC, momentum, lr * rms, lr * weight_decay
    )
