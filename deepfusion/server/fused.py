"""The mixture on our kernels while a stage runs, and as it was before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from deepfusion_kernels import patching

from .teaching import backend_of


@contextmanager
def fused_experts(model: nn.Module, kernels: str) -> Iterator[None]:
    """Experts and routers run through moe_experts and moe_route inside the block."""
    patching.enable(model, backend_of(kernels))
    try:
        yield
    finally:
        patching.disable(model)
