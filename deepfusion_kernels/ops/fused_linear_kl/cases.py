"""Shapes of the fused linear loss: tiny ones for tests, the demo's and a small language model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...cases import Case


def _make(
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    T: int,
    V: int,
    D_s: int,
    D_t: int,
    **options: Any,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # heads scaled so that the logits have the spread of a trained model's, about 3
    arguments: dict[str, Any] = {
        "student_hidden": normal(T, D_s),
        "student_weight": normal(V, D_s) * (3 / D_s**0.5),
        "teacher_hidden": normal(T, D_t),
        "teacher_weight": normal(V, D_t) * (3 / D_t**0.5),
    }
    arguments = {name: tensor.to(device, dtype) for name, tensor in arguments.items()}
    for name in ("student_hidden", "student_weight"):
        arguments[name].requires_grad_()
    if options.get("ce_weight"):
        arguments["labels"] = torch.randint(V, (T,), generator=generator).to(device)
    if options.get("kd_weight") == 0:
        arguments["teacher_hidden"] = arguments["teacher_weight"] = None
    return arguments | options


def _case(
    name: str, T: int, V: int, D_s: int, D_t: int, quick: bool = False, **options: Any
) -> Case:
    teacher = 0 if options.get("kd_weight") == 0 else D_t

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        return _make(device, dtype, seed, T, V, D_s, D_t, **options)

    def bytes_moved(itemsize: int) -> int:
        # each hidden state and head read once, both student gradients written
        return itemsize * (2 * D_s + teacher) * (T + V)

    flops = 2 * T * V * (3 * D_s + teacher)
    return Case(name, "fused_linear_kl_distillation", make, bytes_moved, flops, quick)


CASES: tuple[Case, ...] = (
    _case("T5-V33-D7", 5, 33, 7, 7, quick=True),
    _case(
        "T9-V40-D8-mixed", 9, 40, 8, 5, quick=True, ce_weight=0.5, temperature=2.0, chunk_bytes=600
    ),
    _case(
        "T6-V21-D4-jsd",
        6,
        21,
        4,
        4,
        quick=True,
        divergence="jsd",
        reduction="sum",
        chunk_bytes=99999,
    ),
    _case("T1024-V2048-D192-demo", 1024, 2048, 192, 128, ce_weight=0.5),
    _case("T1024-V2048-D192-ce", 1024, 2048, 192, 128, kd_weight=0.0, ce_weight=1.0),
    _case("T512-V32000-D512", 512, 32000, 512, 512),
)
