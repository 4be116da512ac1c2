"""The parts of a mixture of experts by name, whatever class it is.

Qwen2-MoE    softmax router, shared expert behind a sigmoid gate, no scaling field
DeepSeek-V3  sigmoid router, shared experts, routed_scaling_factor
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from . import build
from .moe import shared_expert


@dataclass(frozen=True)
class MoeBlock:
    """One layer's mixture: router.weight [E, D], gate_up [E, 2F, D], down [E, D, F].

    `shared` holds gate_proj, up_proj, down_proj; `shared_gate` is None where the class has none.
    """

    name: str
    router: nn.Module
    gate_up: nn.Parameter
    down: nn.Parameter
    shared: nn.Module
    shared_gate: nn.Linear | None


def moe_blocks(model: nn.Module) -> list[MoeBlock]:
    """Every mixture layer, in depth order; empty for a dense model."""
    names = {id(module): name for name, module in model.named_modules()}
    blocks = []
    for layer in build.layers(model):
        ffn = cast(Any, build.ffn(layer))
        if build.is_moe(ffn):
            gate, expert = shared_expert(ffn)
            stacked = ffn.experts
            blocks.append(
                MoeBlock(
                    names[id(ffn)], ffn.gate, stacked.gate_up_proj, stacked.down_proj, expert, gate
                )
            )
    return blocks


def routers(model: nn.Module) -> list[nn.Module]:
    """The router of every mixture layer; its forward returns (logits, weights, experts)."""
    return [block.router for block in moe_blocks(model)]


def router_probabilities(model: nn.Module, logits_TE: Tensor) -> Tensor:
    """The routers' scores as probabilities [T, E] float32: softmax, or sigmoid over its sum."""
    if _config(model).model_type == "deepseek_v3":
        return F.normalize(logits_TE.float().sigmoid(), p=1.0, dim=-1)
    return logits_TE.float().softmax(dim=-1)


def scales_routed(model: nn.Module) -> bool:
    """Whether the class itself multiplies the routed output by a factor of its configuration."""
    return hasattr(_config(model), "routed_scaling_factor")


def has_constant_weights(model: nn.Module) -> bool:
    """Whether every token gives its one expert weight 1, so that no router learns from the loss."""
    config = _config(model)
    return bool(config.norm_topk_prob) and config.num_experts_per_tok == 1


def _config(model: nn.Module) -> Any:
    return model.config
