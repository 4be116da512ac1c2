"""Low-rank updates of the matrices inside a model's layers, as they travel and as they are merged.

    m = base + L R        L [rows, r], R [r, columns] of every matrix inside a layer, as stored

Both factors are encoded against zero: they are themselves the update, so that int8 blocks of them
err by a share of the update, as `delta-int8` does for whole models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..checkpoints import find_ties

LEFT, RIGHT = "@left", "@right"
# a tensor with a number between dots in its name belongs to one layer of a stack
INSIDE_A_LAYER = re.compile(r"\.\d+\.", re.ASCII)


def adapted(base: Mapping[str, Tensor]) -> list[str]:
    """The tensors that get an update: floating matrices inside the layers, sorted."""
    ties = find_ties(base)
    return [
        name
        for name in sorted(base.keys() - ties.keys())
        if base[name].dim() == 2 and base[name].is_floating_point() and INSIDE_A_LAYER.search(name)
    ]


def factors(base: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The zeros that the factors of an upload are encoded against, by name. Raises ValueError where
    nothing could be adapted, or the rank exceeds a matrix."""
    names = adapted(base)
    if not names:
        raise ValueError("adapter: a model must have matrices inside numbered layers, got none")
    found = {}
    for name in names:
        rows, columns = base[name].shape
        if not 1 <= rank <= min(rows, columns):
            raise ValueError(
                f"adapter: rank must be in [1, {min(rows, columns)}] for {name!r} "
                f"[{rows}, {columns}], got {rank}; set devices.adapter_rank lower"
            )
        found[name + LEFT] = torch.zeros(rows, rank)
        found[name + RIGHT] = torch.zeros(rank, columns)
    return found


def merged(base: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model of an upload, float32 (integers as they were); sent: decoded factors by name.

    Tensors that are not adapted are the base's; tied names share one tensor.
    """
    ties = find_ties(base)
    state = {}
    for name in base.keys() - ties.keys():
        tensor = base[name].cpu()
        state[name] = tensor.float() if tensor.is_floating_point() else tensor
        if name + LEFT in sent:
            state[name] = state[name] + sent[name + LEFT] @ sent[name + RIGHT]
    return state | {name: state[kept] for name, kept in ties.items()}


def norm(left: Tensor, right: Tensor) -> float:
    """|L R| without the product: sqrt(sum (L^T L) * (R R^T)), in float64."""
    left, right = left.double(), right.double()
    square = ((left.T @ left) * (right @ right.T)).sum()
    return float(square.clamp_min(0).sqrt())
