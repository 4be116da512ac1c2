"""The C++ router; torch sends it to the CPU or CUDA by device."""

from __future__ import annotations

import torch
from torch import Tensor

from .options import Options

_ops = torch.ops.deepfusion_native


def forward(logits: Tensor, bias: Tensor | None, options: Options) -> tuple[Tensor, ...]:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    bias = None if bias is None else bias.to(wide).contiguous()
    return tuple(_ops.moe_route_forward(logits, bias, *options))


def backward(
    dweights: Tensor,
    daux: Tensor,
    logits: Tensor,
    experts: Tensor,
    weights: Tensor,
    counts: Tensor,
    picked: Tensor,
    lse: Tensor,
    mass: Tensor,
    options: Options,
) -> Tensor:
    dlogits: Tensor = _ops.moe_route_backward(
        dweights, daux, logits, experts, weights, counts, picked, lse, mass, *options
    )
    return dlogits
