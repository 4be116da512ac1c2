"""One matrix a thread in C++; bfloat16 products where the processor has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reference import QUINTIC, ROUNDS


def declines(name: str, tensor: Tensor, **facts: Any) -> str | None:
    """Why this backend cannot serve, or None."""
    return None if tensor.dtype == torch.float32 else f"needs float32, got {tensor.dtype}"


def forward(matrices_NAB: Tensor) -> Tensor:
    """As reference.forward."""
    matrices_NAB = matrices_NAB.contiguous()
    out_NAB = torch.empty_like(matrices_NAB)
    torch.ops.deepfusion_native.orthogonalise(matrices_NAB, out_NAB, ROUNDS, *QUINTIC)
    return out_NAB
