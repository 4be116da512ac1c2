"""Tile sizes of the Triton kernels: picked by hand for each architecture, none swept at run time.

A row tile belongs to one expert. Its height follows the mean number of rows an expert, which the
host knows: a tile that is half empty multiplies zeros. None of these has run on a GPU yet: they are
what compiles without spills, within the target's shared memory, with the fewest bytes a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Columns and depth of a tile, buffers in flight, warps, programs a multiprocessor."""

    columns: int
    depth: int
    stages: int
    warps: int
    programs: int = 1


class Config(NamedTuple):
    """One tile a kernel; the rows of all but dweight's, whose own are `lines`.

    gathers: x and dout are read through the plan inside the products, else copied in expert order
    first. descriptors: weights, and rows in expert order, come by TMA where their strides allow.
    """

    rows: int
    up: Tile
    down: Tile
    dact: Tile
    dx: Tile
    dweight: Tile
    lines: int
    gathers: bool = True
    descriptors: bool = False


# rows an expert, at least, for tiles of 128 and of 64 rows; below, tiles of 16: decoding
HIGH, MIDDLE = 96, 24

AMPERE = (
    Config(
        128, Tile(64, 64, 3, 8, 2), Tile(128, 64, 3, 8), Tile(128, 32, 5, 8),
        Tile(128, 64, 3, 8), Tile(128, 32, 8, 8), 128,
    ),
    Config(
        64, Tile(64, 64, 3, 4, 2), Tile(128, 64, 3, 4, 2), Tile(64, 64, 3, 4, 2),
        Tile(128, 64, 3, 4, 2), Tile(128, 32, 8, 8), 128,
    ),
    Config(
        16, Tile(32, 128, 4, 4, 2), Tile(32, 128, 4, 4, 4), Tile(32, 128, 4, 4, 4),
        Tile(64, 64, 4, 4, 4), Tile(128, 32, 6, 4, 2), 64,
    ),
)  # fmt: skip
# a load through the plan waits for another: dweight's six stages are three strips in flight
HOPPER = (
    Config(
        128, Tile(128, 64, 4, 8), Tile(256, 64, 4, 8), Tile(128, 64, 4, 8),
        Tile(256, 64, 4, 8), Tile(256, 64, 6, 8), 128, descriptors=True,
    ),
    Config(
        64, Tile(64, 64, 4, 4, 2), Tile(128, 64, 4, 4, 2), Tile(64, 64, 4, 4, 2),
        Tile(128, 64, 4, 4, 2), Tile(256, 64, 6, 8), 128, descriptors=True,
    ),
    AMPERE[2],
)  # fmt: skip
# the same sizes: accumulators live in tensor memory there
BLACKWELL = HOPPER
# 99 KiB of shared memory, and Ampere's instructions: also Ada and the small Amperes
WORKSTATION = AMPERE
# rows copied in expert order first, then all by TMA: kept to be measured against HOPPER[0]
COPIED = HOPPER[0]._replace(gathers=False, dweight=Tile(256, 64, 4, 8))
# exact float32 has no tensor core to feed
FLOAT32 = Config(
    64, Tile(32, 32, 3, 4, 2), Tile(64, 32, 3, 4, 2), Tile(32, 32, 3, 4, 2),
    Tile(64, 32, 3, 4, 2), Tile(64, 32, 3, 4, 2), 64,
)  # fmt: skip
FLOAT32_FEW = FLOAT32._replace(rows=16)
# few programs: the interpreter's time goes by operations, not by their size
INTERPRETED = Config(
    32, Tile(64, 64, 1, 4), Tile(64, 64, 1, 4), Tile(64, 64, 1, 4), Tile(64, 64, 1, 4),
    Tile(64, 64, 1, 4), 64,
)  # fmt: skip
TARGETS = {80: AMPERE, 90: HOPPER, 100: BLACKWELL, 120: WORKSTATION}
forced: list[Config] = []


def target(capability: tuple[int, int]) -> int:
    """The architecture whose tiles a device takes."""
    major, minor = capability
    if major == 8:
        return 80 if minor in (0, 7) else 120
    return {9: 90, 10: 100, 11: 100}.get(major, 120)


def table(architecture: int, dtype: torch.dtype, rows_per_expert: float) -> Config:
    """The configuration of an architecture for this many rows an expert on average."""
    if dtype == torch.float32:
        return FLOAT32 if rows_per_expert >= MIDDLE else FLOAT32_FEW
    size = 0 if rows_per_expert >= HIGH else 1 if rows_per_expert >= MIDDLE else 2
    return TARGETS[architecture][size]


@contextmanager
def using(config: Config) -> Iterator[None]:
    """Every call inside takes this configuration: to measure one against the other, or to test."""
    forced.append(config)
    try:
        yield
    finally:
        forced.pop()


def choose(device: torch.device, dtype: torch.dtype, rows: int, experts: int) -> Config:
    """The configuration of a call; under the interpreter one for small sizes."""
    if forced:
        return forced[-1]
    if device.type == "cpu":
        return INTERPRETED
    capability, _ = describe(device)
    return table(target(capability), dtype, rows / experts)


@cache
def describe(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; the interpreter's stand for a device."""
    if device.type == "cpu":
        return (8, 0), 3
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count
