"""Shapes of dispatch and combine worth testing or timing."""

from __future__ import annotations

from typing import Any

import torch

from ...cases import Case
from ..shared.moe_plan import plan


def _experts(device: torch.device, T: int, K: int, E: int, seed: int, slack: int) -> torch.Tensor:
    """Ids drawn evenly; with slack, some are sentinels."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(-slack, E + slack, (T, K), device=device, generator=generator)


def _normal(device: torch.device, dtype: torch.dtype, seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(shape, device=device, generator=generator, dtype=torch.float32)
    return values.to(dtype).requires_grad_()


def _case(name: str, door: str, T: int, D: int, E: int, K: int, quick: bool = False) -> Case:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        experts = _experts(device, T, K, E, seed, slack=int(quick))
        if door == "moe_plan":
            return {"experts": experts, "num_experts": E}
        if door == "moe_dispatch":
            return {"hidden": _normal(device, dtype, seed, T, D), "plan": plan(experts, E)}
        weights = _normal(device, torch.float32, seed + 1, T, K)
        rows = _normal(device, dtype, seed, T * K, D)
        return {"rows": rows, "plan": plan(experts, E), "weights": weights}

    R = T * K
    if door == "moe_plan":
        return Case(f"{door}-{name}", door, make, lambda itemsize: R * 16 + 4 * E, 0, quick)
    # forward T + R rows, backward the same; combine reads rows once more for its weights' gradient
    passes = 2 * (T + R) + (R if door == "moe_combine" else 0)
    flops = 4 * R * D if door == "moe_combine" else R * D
    return Case(f"{door}-{name}", door, make, lambda itemsize: passes * D * itemsize, flops, quick)


CASES: tuple[Case, ...] = tuple(
    _case(name, door, T, D, E, K, quick)
    for door in ("moe_plan", "moe_dispatch", "moe_combine")
    for name, T, D, E, K, quick in (
        ("T5-D3-E7-K2", 5, 3, 7, 2, True),
        ("T17-D33-E60-K4", 17, 33, 60, 4, True),
        # the two expert shapes of docs/benchmarks.md, then one layer of Qwen3-30B-A3B
        ("T2048-D512-E60-K4", 2048, 512, 60, 4, False),
        ("T2048-D256-E16-K2", 2048, 256, 16, 2, False),
        ("T16384-D2048-E128-K8", 16384, 2048, 128, 8, False),
    )
)
