"""Which gradients are wanted, and a gradient formed in the forward pass times its upstream."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .patches import wide_dtype


def wants(*inputs: Tensor | None) -> tuple[bool, ...]:
    """Which of these will be asked for a gradient."""
    enabled = torch.is_grad_enabled()
    return tuple(enabled and tensor is not None and tensor.requires_grad for tensor in inputs)


def where_wanted(gradients: Iterable[Tensor], wanted: Iterable[bool]) -> list[Tensor | None]:
    """None in the place of every gradient that nobody asked for."""
    return [g if want else None for g, want in zip(gradients, wanted, strict=True)]


def scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * upstream, a scalar, rounded once."""
    return (gradient * upstream.to(wide_dtype(dtype))).to(dtype)
