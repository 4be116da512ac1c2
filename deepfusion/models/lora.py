"""Low-rank adapters inside a model, by peft: W + scale B A, where only A and B learn.

peft stores A [r, in] and B [out, r]; a matrix that is stored as [in, out] (gpt2) gets the update
turned: left = A^T, right = B^T. The scale is part of the left factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# the update's scale; peft's papers use alpha = 2 r
SCALE = 2
NAME = "default"


def add(model: nn.Module, names: Sequence[str], rank: int, generator: torch.Generator) -> None:
    """Put adapters of a rank into the modules that own the weights `names`; all else is frozen.

    Their first output is zero. Raises ImportError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError(
            "devices.adapter_rank > 0 needs peft: pip install 'deepfusion-moe[lora]'"
        ) from None
    targets = [name.removesuffix(".weight") for name in names]
    turned = any(_is_turned(model.get_submodule(one)) for one in targets)
    config = LoraConfig(
        r=rank, lora_alpha=SCALE * rank, target_modules=targets, fan_in_fan_out=turned
    )
    with torch.random.fork_rng(devices=[]):
        # peft draws from the global generator
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        inject_adapter_in_model(config, model, NAME)
    learning = sum(parameter.requires_grad for parameter in model.parameters())
    assert learning == 2 * len(targets), "only the adapters' two matrices learn"


def factors(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight name -> (left [rows, r], right [r, columns]): what is added to it, as it is stored."""
    found = {}
    for name in names:
        module: Any = model.get_submodule(name.removesuffix(".weight"))
        a, b = (one[NAME].weight.detach() for one in (module.lora_A, module.lora_B))
        scale = module.scaling[NAME]
        turned = _is_turned(module.get_base_layer())
        found[name] = (scale * a.T, b.T) if turned else (scale * b, a)
    return found


def _is_turned(module: nn.Module) -> bool:
    """Whether a layer stores its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"
