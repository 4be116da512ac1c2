"""Shapes of kl_distillation: the benchmark page's, released vocabularies', tiny odd ones."""

from __future__ import annotations

from typing import Any

import torch

from ...cases import Case, Make


def _make(T: int, V: int, *, with_labels: bool = False, **options: Any) -> Make:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(seed)
        student = torch.randn(T, V, generator=generator, device=device) * 3
        noise = torch.randn(T, V, generator=generator, device=device)
        arguments: dict[str, Any] = {
            "student_logits": student.to(dtype).requires_grad_(),
            "teacher_logits": (student + noise).to(dtype),
            **options,
        }
        if with_labels:
            labels = torch.randint(V, (T,), generator=generator, device=device)
            labels[::3] = -100
            arguments["labels"] = labels
        return arguments

    return make


def _case(name: str, T: int, V: int, *, quick: bool = False, **options: Any) -> Case:
    """Forward reads both logits once (jsd twice), backward reads both and writes one gradient."""
    streams = 7 if options.get("divergence") == "jsd" else 5
    make = _make(T, V, **options)
    return Case(
        name, "kl_distillation", make, lambda size: streams * T * V * size, 40 * T * V, quick
    )


CASES: tuple[Case, ...] = (
    _case("T5-V33", 5, 33, quick=True, temperature=2.0),
    _case("T3-V65-jsd-ce", 3, 65, quick=True, with_labels=True, divergence="jsd", ce_weight=0.5),
    _case("T4-V40-reverse", 4, 40, quick=True, divergence="reverse_kl", reduction="sum"),
    _case("T512-V32000", 512, 32000),
    _case("T512-V32000-tau2", 512, 32000, temperature=2.0),
    _case("T512-V32000-reverse", 512, 32000, divergence="reverse_kl"),
    _case("T512-V32000-jsd", 512, 32000, divergence="jsd"),
    _case("T512-V32000-ce", 512, 32000, with_labels=True, ce_weight=0.5, temperature=2.0),
    _case("T128-V151936", 128, 151936),
)
