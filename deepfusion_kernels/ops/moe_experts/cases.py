"""Shapes worth testing and timing: odd ones, the demo's, those with a speed promised, decoding."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ...cases import Case

# what wants a gradient: training, fixed experts below adapters, generation
ALL = ("hidden", "gate_up_proj", "down_proj", "weights")
FROZEN = ("hidden", "weights")
NONE: tuple[str, ...] = ()


def _make(
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    T: int,
    D: int,
    F: int,
    E: int,
    K: int,
    wants: tuple[str, ...],
) -> dict[str, Any]:
    draw = torch.Generator(device="cpu").manual_seed(seed)

    def normal(*shape: int, fan_in: int = 1) -> torch.Tensor:
        values = torch.randn(*shape, generator=draw) / math.sqrt(fan_in)
        return values.to(device, dtype)

    scores = torch.randn(T, E, generator=draw)
    top = scores.softmax(1).topk(K, 1)
    inputs = {
        "hidden": normal(T, D),
        "gate_up_proj": normal(E, 2 * F, D, fan_in=D),
        "down_proj": normal(E, D, F, fan_in=F),
        "experts": top.indices.to(device),
        "weights": top.values.to(device),
    }
    return inputs | {name: inputs[name].requires_grad_() for name in wants}


def _case(
    name: str,
    T: int,
    D: int,
    F: int,
    E: int,
    K: int,
    quick: bool = False,
    wants: tuple[str, ...] = ALL,
) -> Case:
    R = T * K
    # elements: of tokens, of h and its like, of rows, of weights that any row meets
    counts = {ALL: (6, 14, 4, 9), FROZEN: (4, 10, 4, 6), NONE: (2, 4, 2, 3)}[wants]
    factors = {ALL: 18, FROZEN: 12, NONE: 6}[wants]

    def bytes_moved(itemsize: int) -> int:
        sizes = (T * D, R * F, R * D, min(E, R) * F * D)
        return itemsize * sum(count * each for count, each in zip(counts, sizes, strict=True))

    make = partial(_make, T=T, D=D, F=F, E=E, K=K, wants=wants)
    return Case(name, "moe_experts", make, bytes_moved, factors * R * D * F, quick)


CASES: tuple[Case, ...] = (
    _case("odd", 13, 5, 3, 4, 2, quick=True),
    _case("one-token", 1, 17, 35, 3, 3, quick=True),
    _case("ragged-tiles", 37, 33, 18, 5, 2, quick=True),
    _case("demo", 1024, 192, 512, 8, 2),
    _case("fine-grained", 2048, 512, 352, 60, 4),
    _case("wide", 2048, 256, 512, 16, 2),
    _case("fine-grained-frozen", 2048, 512, 352, 60, 4, wants=FROZEN),
    _case("wide-frozen", 2048, 256, 512, 16, 2, wants=FROZEN),
    _case("decode-1", 1, 512, 352, 60, 4, wants=NONE),
    _case("decode-16", 16, 512, 352, 60, 4, wants=NONE),
    _case("decode-64", 64, 512, 352, 60, 4, wants=NONE),
    _case("decode-wide-1", 1, 256, 512, 16, 2, wants=NONE),
    _case("decode-wide-16", 16, 256, 512, 16, 2, wants=NONE),
    _case("decode-wide-64", 64, 256, 512, 16, 2, wants=NONE),
    _case("few-tokens-1", 1, 512, 352, 60, 4),
    _case("few-tokens-16", 16, 512, 352, 60, 4),
    _case("few-tokens-64", 64, 512, 352, 60, 4),
)
