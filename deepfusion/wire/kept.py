"""The likeliest tokens of every position of the public text, as they travel.

    block b      `<b>.ids` int16 or int32 [n, k], `<b>.logprobs` fp16 [n, k]    n <= 8192 positions
    bytes        (2 or 4) + 2 for each of k tokens of a position

Log-probabilities are rounded down to fp16, so that a row never sums to more than 1. Blocks bound
what is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..messages import Content

BLOCK_ROWS = 8192
IDS, LOGPROBS = "ids", "logprobs"
# float32 adds up 1e5 terms of a row to 1e-4; fp16 is rounded down, never up
MOST_MASS = 1 + 1e-3


def id_dtype(vocabulary: int) -> torch.dtype:
    """The smallest type that holds every id."""
    return torch.int16 if vocabulary <= 1 << 15 else torch.int32


def blocks(rows: int) -> Iterator[tuple[str, int, int]]:
    """(name, first row, last row + 1) of every block."""
    for first in range(0, rows, BLOCK_ROWS):
        yield f"{first // BLOCK_ROWS:06d}", first, min(first + BLOCK_ROWS, rows)


def shapes(content: Content) -> dict[str, Tensor]:
    """What must travel, without memory. Raises ValueError for an impossible top_k."""
    if not 1 <= content.top_k <= content.vocabulary:
        raise ValueError(
            f"logprobs: top_k must be in [1, {content.vocabulary}], got {content.top_k}; set "
            "upload.top_k lower"
        )
    found = {}
    for name, first, last in blocks(content.rows):
        shape = (last - first, content.top_k)
        ids = torch.empty(shape, dtype=id_dtype(content.vocabulary), device="meta")
        found[f"{name}.{IDS}"] = ids
        found[f"{name}.{LOGPROBS}"] = torch.empty(shape, dtype=torch.half, device="meta")
    return found


def half_down(logprobs: Tensor) -> Tensor:
    """fp16 that is nowhere above the given values."""
    half = logprobs.half()
    lower = torch.nextafter(half, half.new_full((), -torch.inf))
    return torch.where(half.float() > logprobs.float(), lower, half)


def check(name: str, tensor: Tensor, content: Content) -> None:
    """One tensor of a block; raises ValueError naming it, the first bad row's kind and a number."""
    if name.endswith(IDS):
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= content.vocabulary:
            bad = low if low < 0 else high
            raise ValueError(
                f"tensor {name!r} must hold ids in [0, {content.vocabulary}), got {bad}"
            )
        ordered = tensor.sort(dim=1).values
        if repeats := int((ordered[:, 1:] == ordered[:, :-1]).any(dim=1).sum()):
            raise ValueError(f"tensor {name!r} holds {repeats} rows that name a token twice")
        return
    values = tensor.float()
    if bad := int((~values.isfinite()).sum()):
        raise ValueError(f"tensor {name!r} holds {bad} non-finite values")
    if rising := int((values[:, 1:] > values[:, :-1]).any(dim=1).sum()):
        raise ValueError(f"tensor {name!r} holds {rising} rows that do not descend")
    # exp of the largest first: a positive log-probability overflows, and is over 1 all the same
    if (most := float(values.exp().sum(dim=1).max())) > MOST_MASS:
        raise ValueError(f"tensor {name!r} must have rows that sum to at most 1, got {most:.6g}")
