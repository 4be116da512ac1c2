"""Shapes worth testing and timing: odd ones, the demo's, and those with a speed promised."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ...cases import Case


def _make(
    device: torch.device, dtype: torch.dtype, seed: int, T: int, D: int, F: int, E: int, K: int
) -> dict[str, Any]:
    draw = torch.Generator(device="cpu").manual_seed(seed)

    def normal(*shape: int, fan_in: int = 1) -> torch.Tensor:
        values = torch.randn(*shape, generator=draw) / math.sqrt(fan_in)
        return values.to(device, dtype).requires_grad_()

    scores = torch.randn(T, E, generator=draw)
    top = scores.softmax(1).topk(K, 1)
    return {
        "hidden": normal(T, D),
        "gate_up_proj": normal(E, 2 * F, D, fan_in=D),
        "down_proj": normal(E, D, F, fan_in=F),
        "experts": top.indices.to(device),
        "weights": top.values.to(device).requires_grad_(),
    }


def _case(name: str, T: int, D: int, F: int, E: int, K: int, quick: bool = False) -> Case:
    R = T * K

    def bytes_moved(itemsize: int) -> int:
        return itemsize * (6 * T * D + 14 * R * F + 4 * R * D + 9 * E * F * D)

    make = partial(_make, T=T, D=D, F=F, E=E, K=K)
    return Case(name, "moe_experts", make, bytes_moved, 18 * R * D * F, quick)


CASES: tuple[Case, ...] = (
    _case("odd", 13, 5, 3, 4, 2, quick=True),
    _case("one-token", 1, 17, 35, 3, 3, quick=True),
    _case("ragged-tiles", 37, 33, 18, 5, 2, quick=True),
    _case("demo", 1024, 192, 512, 8, 2),
    _case("fine-grained", 2048, 512, 352, 60, 4),
    _case("wide", 2048, 256, 512, 16, 2),
)
