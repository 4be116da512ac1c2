"""Random numbers by name: same seed, same names, same numbers, whoever asks and in which order.

seed_for(s, a, b, ..) = first 63 bits of SHA-256 of the JSON list [s, a, b, ..]
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch


def seed_for(seed: int, *names: str | int) -> int:
    """A seed in [0, 2^63) of its own for these names; 1 and "1" are different names."""
    digest = hashlib.sha256(json.dumps([int(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: str = "cpu") -> torch.Generator:
    """A torch generator of its own for these names."""
    return torch.Generator(device=device).manual_seed(seed_for(seed, *names))


def numpy_rng(seed: int, *names: str | int) -> np.random.Generator:
    """A numpy generator of its own for these names."""
    return np.random.default_rng(seed_for(seed, *names))
