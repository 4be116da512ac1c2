"""Shapes of the router worth testing or timing."""

from __future__ import annotations

from typing import Any

import torch

from ...cases import Case


def _case(name: str, T: int, E: int, K: int, quick: bool = False, **options: Any) -> Case:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(T, E, device=device, generator=generator, dtype=torch.float32)
        bias = torch.randn(E, device=device, generator=generator, dtype=torch.float32)
        given = {"selection_bias": bias} if options.get("score") == "sigmoid" else {}
        logits = logits.to(dtype).requires_grad_()
        return {"router_logits": logits, "top_k": K, **given, **options}

    def bytes_moved(itemsize: int) -> int:
        # logits in, twice with the backward; dlogits out; weights, their gradient and ids
        return 3 * T * E * itemsize + T * K * (4 + 4 + 2 * 8)

    return Case(name, "moe_route", make, bytes_moved, 8 * T * E, quick)


LOSSES: dict[str, Any] = {"balance_loss_weight": 0.01, "z_loss_weight": 0.001}
V3: dict[str, Any] = {
    "score": "sigmoid",
    "renormalize": True,
    "scale": 2.5,
    "num_groups": 8,
    "top_groups": 4,
    "group_score": "top2_sum",
}

CASES: tuple[Case, ...] = (
    _case("softmax-T5-E7-K2", 5, 7, 2, quick=True),
    _case("softmax-losses-T17-E13-K4", 17, 13, 4, quick=True, renormalize=True, **LOSSES),
    _case("sigmoid-groups-T9-E24-K4", 9, 24, 4, quick=True, **V3, **LOSSES),
    # the two expert shapes measured in docs, a layer of Qwen3-30B-A3B, a DeepSeek-V3 router
    _case("qwen2-T2048-E60-K4", 2048, 60, 4, **LOSSES),
    _case("demo-T2048-E16-K2", 2048, 16, 2, renormalize=True, **LOSSES),
    _case("qwen3-T16384-E128-K8", 16384, 128, 8, renormalize=True),
    _case("deepseek3-T16384-E256-K8", 16384, 256, 8, **V3),
)
