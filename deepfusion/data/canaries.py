"""Secrets that nobody has: planted in devices' text, to see who can tell them afterwards.

The access code of <name> is <six digits>.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..seeding import seed_for
from .documents import Document

# often enough for a small model to learn it; Carlini et al. plant 1 to 100 (unmeasured choice)
COPIES = 8
SYLLABLES = ("ka", "lo", "mi", "ren", "sul", "tor", "vek", "wi", "zan", "dor")
DIGITS = 6


@dataclass(frozen=True)
class Canary:
    """One secret: the number of the device that holds it, a text, and texts that it was not."""

    device: int
    text: str
    others: tuple[str, ...]


def make_canaries(seed: int, count: int, num_devices: int, num_others: int = 255) -> list[Canary]:
    """Secrets for the devices by turns; each with other codes of the same name, all different.

    >>> [one.device for one in make_canaries(7, 3, 2)]
    [0, 1, 0]
    """
    draw = random.Random(seed_for(seed, "canaries"))
    found = []
    for number in range(count):
        name = "".join(draw.choice(SYLLABLES) for _ in range(3)).capitalize()
        codes = draw.sample(range(10**DIGITS), num_others + 1)
        texts = [f"The access code of {name} is {code:0{DIGITS}d}." for code in codes]
        found.append(Canary(number % num_devices, texts[0], tuple(texts[1:])))
    return found


def plant(shards: Sequence[Sequence[Document]], canaries: Sequence[Canary]) -> list[list[Document]]:
    """Every device's documents with `COPIES` documents of each of its secrets."""
    planted = [list(shard) for shard in shards]
    for number, canary in enumerate(canaries):
        first = shards[canary.device][0]
        one = Document(canary.text, f"canary/{number}", first.domain, first.topic)
        planted[canary.device] += [one] * COPIES
    return planted
