"""How far a variant's outputs and gradients are from the reference in float64.

error = max over tensors of max |ours - truth| / max |truth|
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Door = Callable[..., Any]
# 2 GiB in float64, of which a reference may hold half a dozen at once; larger cases go unjudged
MOST_ELEMENTS = 2**28


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nest of lists and tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def rebuilt(value: Any, items: Iterable[Any]) -> Any:
    """A list or tuple of the same kind as value: named tuples take their items one by one."""
    return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)


def uneven(like: Tensor) -> Tensor:
    """1/4, 1/2, .. 5/4, over again: exact in every dtype."""
    places = torch.arange(like.numel(), device=like.device).view(like.shape)
    return ((places % 5 + 1) / 4).to(like.dtype)


def outputs_and_gradients(
    door: Door, arguments: Mapping[str, Any], upstream: Callable[[Tensor], Tensor] = uneven
) -> tuple[list[Tensor], list[Tensor]]:
    """Floating outputs of a call, and the gradients for `upstream` at those that have any.

    Uneven, since ones leave only noise to compare where the sum of an output is a constant.
    """
    wanted = [t for value in arguments.values() for t in tensors_in(value) if t.requires_grad]
    outputs = [t for t in tensors_in(door(**arguments)) if t.is_floating_point()]
    heads = [t for t in outputs if t.requires_grad]
    if not (wanted and heads):
        return outputs, []
    given = [upstream(head) for head in heads]
    gradients = torch.autograd.grad(heads, wanted, given, allow_unused=True)
    return outputs, [gradient for gradient in gradients if gradient is not None]


def _in_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        return rebuilt(value, map(_in_float64, value))
    return value


def truth_of(door: Door, arguments: Mapping[str, Any]) -> list[Tensor] | None:
    """The reference in float64 on the same rounded inputs; None where it would not fit."""
    sizes = [t.numel() for value in arguments.values() for t in tensors_in(value)]
    if sum(sizes) > MOST_ELEMENTS:
        return None
    exact = {name: _in_float64(value) for name, value in arguments.items()}
    outputs, gradients = outputs_and_gradients(door, {**exact, "backend": "reference"})
    return [tensor.detach() for tensor in outputs + gradients]


def error_against(truth: list[Tensor] | None, found: list[Tensor]) -> float | None:
    """The largest relative error of any tensor; None without a truth, or with none to compare."""
    if not truth or len(truth) != len(found):
        return None
    errors = [0.0]
    for exact, ours in zip(truth, found, strict=True):
        if exact.numel():
            scale = exact.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            errors.append(float((ours.detach().double() - exact).abs().max() / scale))
    return max(errors)
