"""The C++ router; torch sends it to the CPU or CUDA by device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .options import Options

_ops = torch.ops.deepfusion_native

# compute capabilities whose `make gpu` the CUDA kernels have passed; elsewhere only on request
PROVEN_ON: frozenset[tuple[int, int]] = frozenset()

# CUDA: a warp keeps a row in its registers
MAX_EXPERTS = 1024


def declines(name: str, tensor: Tensor, *, num_experts: int = 1, **facts: Any) -> str | None:
    """CUDA serves two- and four-byte floats and up to 1024 experts."""
    if name != "cuda":
        return None
    if tensor.dtype == torch.float64:
        return "moe_route serves float32, bfloat16 and float16, got float64"
    if num_experts > MAX_EXPERTS:
        return f"moe_route serves at most {MAX_EXPERTS} experts, got {num_experts}"
    return None


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
