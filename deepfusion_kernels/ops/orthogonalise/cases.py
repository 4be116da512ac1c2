"""Stacks of matrices, and steps along them: odd ones for tests, the demo's mixture for timing."""

from __future__ import annotations

from typing import Any

import torch

from ...cases import Case, Make
from .reference import ROUNDS


def _make(N: int, A: int, B: int) -> Make:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return {"matrices": torch.randn(N, A, B, generator=draw).to(device, wide)}

    return make


def _products(A: int, B: int) -> int:
    """Of one matrix; G and G G are symmetric: half of each."""
    short, long = min(A, B), max(A, B)
    return ROUNDS * (short * short * long + short**3 + 2 * short * short * long)


def _case(name: str, N: int, A: int, B: int) -> Case:
    return Case(
        name=name,
        door="orthogonalise",
        make=_make(N, A, B),
        # in and out, in float32 whatever the products are
        bytes_moved=lambda itemsize: 8 * N * A * B,
        flops=N * _products(A, B),
        quick=N * A * B <= 4096,
    )


def _step_case(name: str, *stacks: tuple[int, int, int]) -> Case:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(seed)
        found: dict[str, Any] = {
            role: [torch.randn(shape, generator=draw).to(device) for shape in stacks]
            for role in ("parameters", "gradients", "momenta")
        }
        return {**found, "lr": 0.01, "weight_decay": 0.1}

    elements = sum(N * A * B for N, A, B in stacks)
    return Case(
        name=name,
        door="muon_step",
        make=make,
        # a gradient in, a parameter and a momentum in and out
        bytes_moved=lambda itemsize: 20 * elements,
        flops=sum(N * _products(A, B) for N, A, B in stacks),
        quick=elements <= 4096,
    )


CASES: tuple[Case, ...] = (
    _case("tiny-wide", 3, 5, 9),
    _case("tiny-tall", 2, 33, 7),
    _case("tiny-square", 2, 17, 17),
    _case("experts-up", 16, 1024, 192),
    _case("experts-down", 16, 192, 512),
    _case("attention", 16, 192, 192),
    _step_case("tiny-step", (3, 5, 9), (1, 33, 7), (2, 5, 9)),
)
