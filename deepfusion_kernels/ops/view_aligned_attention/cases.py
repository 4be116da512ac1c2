"""Shapes of the attention: odd ones for tests, the demo's, PAT's and the headline for timing."""

from __future__ import annotations

from typing import Any

import torch

from ...cases import Case, Make


def _make(
    batch: int, stages: int, patches: int, dim: int, heads: int, causal: bool, masked: bool
) -> Make:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(batch, stages, patches, dim, generator=generator)
        weight = torch.randn(3 * dim, dim, generator=generator) * dim**-0.5
        mask = torch.rand(batch, patches, generator=generator) > 0.3
        return {
            "features": features.to(device, dtype).requires_grad_(),
            "qkv_weight": weight.to(device, dtype).requires_grad_(),
            "num_heads": heads,
            "causal": causal,
            "patch_mask": mask.to(device) if masked else None,
        }

    return make


def _case(
    name: str, B: int, S: int, Q: int, D: int, H: int, causal: bool = False, masked: bool = False
) -> Case:
    rows, tokens = B * S * Q, S * Q
    return Case(
        name=name,
        door="multi_stage_attention",
        make=_make(B, S, Q, D, H, causal, masked),
        # X, QKV and Y and their gradients once each, the weight and its gradient
        bytes_moved=lambda itemsize: itemsize * (10 * rows * D + 6 * D * D),
        flops=18 * rows * D * D + 14 * B * tokens * tokens * D,
        quick=rows <= 64,
    )


CASES: tuple[Case, ...] = (
    _case("tiny", 2, 3, 5, 12, 3),
    _case("tiny-causal-masked", 3, 2, 7, 16, 2, causal=True, masked=True),
    _case("one-patch", 1, 1, 1, 8, 1),
    _case("two-tiles", 1, 3, 43, 32, 2, causal=True, masked=True),
    _case("odd-heads", 2, 2, 9, 10, 2, causal=True, masked=True),
    _case("demo", 8, 4, 16, 128, 4),
    _case("pat", 8, 4, 16, 512, 8),
    _case("headline-causal", 8, 4, 256, 512, 8, causal=True, masked=True),
)
