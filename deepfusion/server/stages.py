"""Features of a model at J cuts of its depth.

stage j ends after layer ceil(j L / J), j = 1..J;  the residual stream there, before the final norm
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..models import build


def cuts(depth: int, num_stages: int) -> list[int]:
    """Layers, counted from 1, after which the stages end. Raises ValueError for more stages than
    layers."""
    if not 1 <= num_stages <= depth:
        raise ValueError(
            f"distill.num_stages must lie in 1..{depth}, the depth of a model, got {num_stages}"
        )
    return [-(-j * depth // num_stages) for j in range(1, num_stages + 1)]


@contextmanager
def collecting(model: nn.Module, num_stages: int) -> Iterator[list[Tensor]]:
    """A list that a forward pass inside fills with num_stages tensors [B, L, D]; 0 stages: none."""
    found: list[Tensor] = []
    layers = build.layers(model)
    ends = cuts(len(layers), num_stages) if num_stages else []
    hooks = [layers[end - 1].register_forward_hook(_keeping(found)) for end in ends]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _keeping(found: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def keep(layer: nn.Module, arguments: Any, result: Any) -> None:
        # older layers return (hidden, ...), newer ones the hidden states alone
        found.append(result[0] if isinstance(result, tuple) else result)

    return keep
