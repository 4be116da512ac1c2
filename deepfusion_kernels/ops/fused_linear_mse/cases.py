"""Shapes of the loss: odd ones for tests, a stage of the demo and of the headline for timing."""

from __future__ import annotations

from typing import Any

import torch

from ...cases import Case, Make


def _make(
    batch: int, patches: int, width: int, target_width: int, patch_size: int, tail: int = 0
) -> Make:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator) * scale
            return values.to(device, dtype)

        length = patches * patch_size - tail
        return {
            "features": draw(batch, patches, width).requires_grad_(),
            "weight": draw(target_width, width, scale=width**-0.5).requires_grad_(),
            "bias": draw(target_width).requires_grad_(),
            "target": draw(batch, length, target_width),
            "patch_size": patch_size,
        }

    return make


def _case(name: str, B: int, Q: int, D: int, M: int, p: int, tail: int = 0) -> Case:
    rows = B * Q
    return Case(
        name=name,
        door="fused_linear_mse",
        make=_make(B, Q, D, M, p, tail),
        # features in and out, weight in and out, the target once
        bytes_moved=lambda itemsize: itemsize * (2 * rows * D + 2 * M * D + rows * p * M),
        flops=6 * rows * D * M,
        quick=rows <= 32,
    )


CASES: tuple[Case, ...] = (
    _case("tiny-tail", 2, 3, 5, 7, 4, tail=3),
    _case("tiny-p1", 1, 9, 8, 17, 1),
    _case("demo-stage", 8, 16, 128, 128, 8),
    _case("pat-stage", 8, 16, 512, 512, 8),
    _case("headline-stage", 8, 256, 512, 2048, 8),
)
