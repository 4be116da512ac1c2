"""Shapes of the top-k loss: tiny ones for tests, a small and a large vocabulary."""

from __future__ import annotations

from typing import Any

import torch

from ...cases import Case


def _case(name: str, T: int, V: int, K: int, quick: bool = False, **options: Any) -> Case:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        student, teacher = (3 * torch.randn(T, V, generator=generator) for _ in range(2))
        tau = options.get("temperature", 1.0)
        logprobs, ids = (teacher / tau).log_softmax(-1).topk(K)
        arguments: dict[str, Any] = {
            "student_logits": student.to(device, dtype).requires_grad_(),
            "teacher_ids": ids.to(device),
            "teacher_logprobs": logprobs.to(device),
        }
        if options.get("ce_weight"):
            arguments["labels"] = torch.randint(V, (T,), generator=generator).to(device)
        return arguments | options

    def bytes_moved(itemsize: int) -> int:
        # logits read in both directions, the gradient written
        return T * (3 * V * itemsize + 2 * K * 12)

    # about ten operations for each exponential, once a direction
    return Case(name, "topk_kl_distillation", make, bytes_moved, 20 * T * V, quick)


def _teacher(name: str, T: int, V: int, K: int, D: int = 0, quick: bool = False) -> Case:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(T, D or V, generator=generator)
        arguments: dict[str, Any] = {"logits_or_hidden": rows.to(device, dtype), "k": K}
        if D:
            weight = torch.randn(V, D, generator=generator) * (3 / D**0.5)
            arguments["weight"] = weight.to(device, dtype)
        return arguments

    def bytes_moved(itemsize: int) -> int:
        return itemsize * (D * (T + V) if D else T * V) + 12 * T * K

    return Case(name, "topk_logprobs", make, bytes_moved, T * V * (2 * D + 10), quick)


CASES: tuple[Case, ...] = (
    _case("T5-V33-K4", 5, 33, 4, quick=True),
    _case(
        "T7-V20-K3-mixed", 7, 20, 3, quick=True, ce_weight=0.5, temperature=2.0, divergence="jsd"
    ),
    _case("T4-V9-K2-zero", 4, 9, 2, quick=True, tail="zero", reduction="sum"),
    _case(
        "T6-V11-K5-renormalize", 6, 11, 5, quick=True, tail="renormalize", divergence="reverse_kl"
    ),
    _case("T512-V32000-K64", 512, 32000, 64),
    _case("T512-V151936-K256", 512, 151936, 256),
    _teacher("T5-V33-K4", 5, 33, 4, quick=True),
    _teacher("T6-V40-K3-D7", 6, 40, 3, D=7, quick=True),
    _teacher("T512-V32000-K64", 512, 32000, 64),
    _teacher("T512-V32000-K64-D512", 512, 32000, 64, D=512),
)
