"""The gate's last check, over a round: no upload moved ten times as far as the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ..messages import DeviceUpdate

NORM_FACTOR = 10.0  # method.md 9
NORM_VOTES = 3  # fewer uploads have no median worth the name


@dataclass(frozen=True)
class NormVerdict:
    """The median rule: device -> reason, and architectures with too few uploads for it."""

    refused: Mapping[str, str]
    unchecked: tuple[str, ...]


def check_norms(updates: Sequence[DeviceUpdate]) -> NormVerdict:
    """One scaled upload must not own its cluster's mean (method.md, 9).

        |m_n - base|_t  <=  10 median over the architecture's uploads,   for every tensor t

    A tensor that most devices left alone is held to the median of the devices' largest tensors.
    Architectures with fewer than 3 uploads have no median; they are named as unchecked, and only
    `upload.max_update_norm` bounds them.
    """
    refused: dict[str, str] = {}
    unchecked = []
    for architecture in sorted({update.architecture for update in updates}):
        alike = [update for update in updates if update.architecture == architecture]
        if len(alike) < NORM_VOTES or not all(update.norms for update in alike):
            unchecked.append(architecture)
            continue
        largest = median(max(update.norms.values()) for update in alike)
        for name in alike[0].norms:
            typical = median(update.norms[name] for update in alike) or largest
            for update in alike:
                if update.norms[name] > NORM_FACTOR * typical > 0:
                    refused.setdefault(
                        update.device,
                        f"{update.device}: tensor {name!r} must differ from the base by at most "
                        f"{NORM_FACTOR:g} times the median {typical:.6g}, "
                        f"got {update.norms[name]:.6g}; refused, see audit.jsonl",
                    )
    return NormVerdict(refused, tuple(unchecked))
