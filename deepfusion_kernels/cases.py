"""One shape worth testing or timing, with what it must move and compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Make = Callable[[torch.device, torch.dtype, int], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A call of one door.

    make(device, dtype, seed) returns the door's keyword arguments; tensors that should get a
    gradient have requires_grad set. bytes_moved(itemsize) and flops count forward plus backward at
    the floor.
    quick: small enough for opcheck, the interpreter and gradcheck.
    """

    name: str
    door: str
    make: Make
    bytes_moved: Callable[[int], int]
    flops: int
    quick: bool = False
