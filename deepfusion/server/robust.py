"""Averages that one bad member of a cluster cannot own; they need three members or more.

clip      p = b + mean_n min(1, c / |m_n - b|) (m_n - b)      c = median_n |m_n - b|
median    p_j = median over n of m_nj
trimmed   p_j = mean over n of m_nj without the t smallest and t largest, t = max(1, n // 5)

b is the common start of the architecture. With one or two members no rule can tell who is wrong:
the plain mean is taken, and `rule_of` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from ..messages import DeviceUpdate
from .proxy import expect_alike, mean_state, ties_of

RULES = ("none", "clip", "median", "trimmed")
LEAST_MEMBERS = 3
TRIMMED_PART = 5  # a fifth at either end: one of 3 to 9 members, two of 10
# of all members' copies of some tensors at once; every further piece reads the uploads again
COLUMN_BYTES = 256 << 20

LoadState = Callable[[DeviceUpdate], Mapping[str, Tensor]]
# a cluster's devices, their tensors, cluster.weights
Average = Callable[[Sequence[DeviceUpdate], LoadState, str], dict[str, Tensor]]


def robust_average(rule: str, bases: Mapping[str, Mapping[str, Tensor]] | None = None) -> Average:
    """`robust_state` by a rule; bases: every architecture's common start, for 'clip'."""

    def average(
        devices: Sequence[DeviceUpdate], load_state: LoadState, weights: str
    ) -> dict[str, Tensor]:
        base = None if bases is None else bases[devices[0].architecture]
        return robust_state(devices, load_state, rule, weights, base)

    return average


def rule_of(rule: str, num_members: int) -> str:
    """The rule that a cluster of so many members really gets."""
    return rule if num_members >= LEAST_MEMBERS else "none"


def robust_state(
    devices: Sequence[DeviceUpdate],
    load_state: LoadState,
    rule: str,
    weights: str = "uniform",
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """One model of a cluster's devices by `rule`; tied names stay one tensor.

    base: the common start, for 'clip'. Integer buffers must be equal. Raises ValueError for an
    unknown rule, for 'clip' without a base, and where names or shapes differ.
    """
    if rule not in RULES:
        raise ValueError(f"cluster.robust must be one of {', '.join(RULES)}, got {rule!r}")
    kind = rule_of(rule, len(devices))
    if kind == "none":
        return mean_state(devices, load_state, weights)
    if kind == "clip":
        if base is None:
            raise ValueError("cluster.robust = 'clip' needs the architecture's common start")
        return mean_state(devices, _clipped(devices, load_state, base), weights)
    dropped = (len(devices) - 1) // 2 if kind == "median" else max(1, len(devices) // TRIMMED_PART)
    return _columns(devices, load_state, dropped)


def _clipped(
    devices: Sequence[DeviceUpdate], load_state: LoadState, base: Mapping[str, Tensor]
) -> LoadState:
    """`load_state` with every update drawn back to the members' median length."""
    lengths = {device.device: _length(load_state(device), base) for device in devices}
    bound = median(lengths.values())

    def load(device: DeviceUpdate) -> dict[str, Tensor]:
        state = load_state(device)
        if lengths[device.device] <= bound:
            return dict(state)
        share = bound / lengths[device.device]
        ties = ties_of(state)
        made = {
            name: torch.lerp(base[name].float(), state[name].float(), share).to(state[name].dtype)
            if state[name].is_floating_point()
            else state[name]
            for name, first in ties.items()
            if name == first
        }
        return {name: made[first] for name, first in ties.items()}

    return load


def _length(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """|m - b| over all floating-point tensors, tied ones once."""
    squares = (
        (state[name].double() - base[name].double()).square().sum()
        for name, first in ties_of(state).items()
        if name == first and state[name].is_floating_point()
    )
    return float(sum(squares, torch.zeros((), dtype=torch.float64)).sqrt())


def _columns(
    devices: Sequence[DeviceUpdate], load_state: LoadState, dropped: int
) -> dict[str, Tensor]:
    """Every value's mean over the members without its `dropped` smallest and largest."""
    first = load_state(devices[0])
    ties = ties_of(first)
    kept = [name for name, owner in ties.items() if name == owner]
    made: dict[str, Tensor] = {}
    for names in _pieces(first, kept, len(devices)):
        gathered: dict[str, list[Tensor]] = {name: [] for name in names}
        for device in devices:
            state = load_state(device)
            expect_alike(state, first, ties, device.device, devices[0].device)
            for name in names:
                gathered[name].append(state[name])
        for name in names:
            if first[name].is_floating_point():
                made[name] = _trimmed_mean(gathered.pop(name), dropped).to(first[name].dtype)
            else:
                made[name] = first[name].clone()
    return {name: made[owner] for name, owner in ties.items()}


def _pieces(
    state: Mapping[str, Tensor], names: Sequence[str], num_members: int
) -> Iterator[list[str]]:
    """Names whose copies of all members fit into COLUMN_BYTES together, or one name alone."""
    piece: list[str] = []
    held = 0
    for name in names:
        cost = num_members * 4 * state[name].numel()
        if piece and held + cost > COLUMN_BYTES:
            yield piece
            piece, held = [], 0
        piece.append(name)
        held += cost
    if piece:
        yield piece


def _trimmed_mean(copies: Sequence[Tensor], dropped: int) -> Tensor:
    sorted_N = torch.stack([one.float() for one in copies]).sort(dim=0).values
    kept = sorted_N[dropped : len(copies) - dropped]
    mean = kept[0].clone()
    # a running mean: of equal values it is that value, bit for bit
    for count in range(1, len(kept)):
        mean.lerp_(kept[count], 1 / (count + 1))
    return mean
