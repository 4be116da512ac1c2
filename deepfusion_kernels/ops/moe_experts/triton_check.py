"""Whether Triton's answers are right on a device: three experts, against the reference.

Compilers have been wrong about grouped products (triton #10821), and a wrong gradient does not
stop a training run. The one place of the op that waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference

E, K = 3, 2
NAMES = ("out", "dhidden", "dgate_up_proj", "ddown_proj", "dweights")
# of the largest value of a result: eight roundings of bfloat16
TOLERANCE = 2**-5
Pair = tuple[Callable[..., Any], Callable[..., Any]]


def off(device: torch.device, forward: Callable[..., Any], backward: Callable[..., Any]) -> str:
    """What differs by more than rounding, in words; empty if nothing does."""
    # on a GPU enough rows for the tiles of training; interpreted, what takes a second
    T, D, F = (150, 192, 160) if device.type == "cuda" else (6, 32, 24)
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        values = torch.randn(*shape, generator=draw) / math.sqrt(fan_in)
        return values.to(device, torch.bfloat16)

    hidden, dout, weights = normal(T, D), normal(T, D), normal(T, K).float()
    projections = normal(E, 2 * F, D, fan_in=D), normal(E, D, F, fan_in=F)
    experts = torch.randint(E, (T, K), generator=draw).to(device)
    inputs = (hidden, *projections, experts, weights)
    both: list[list[Tensor]] = []
    law: Pair = (reference.forward, reference.backward)
    for first, second in ((forward, backward), law):
        out, *saved = first(*inputs, "silu")
        grads = second(dout, *inputs, *saved, "silu", (True, True, True, True))
        both.append([out, *grads])
    worst = {
        name: ((ours - truth).abs().max() / truth.abs().max()).item()
        for name, ours, truth in zip(NAMES, *both, strict=True)
    }
    wrong = {name: gap for name, gap in worst.items() if not gap <= TOLERANCE}
    return ", ".join(f"{name} by {gap:.2g} of its largest value" for name, gap in wrong.items())
