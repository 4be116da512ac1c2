"""What crosses the wire and what leaves the gate: devices and the server share nothing else.

device   TrainedDevice -> package: Manifest, shards, embedding
server   package -> gate -> DeviceUpdate
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PROTOCOL = 1
# what a private training must say of itself
PRIVACY = ("epsilon", "delta", "noise", "clip", "rate", "steps")


def device_name(index: int) -> str:
    """The one name that device `index` has in keys, messages, ledger and report."""
    return f"device-{index:02d}"


class UploadRefused(ValueError):
    """An upload that must not be used; the message names device, tensor and number."""


class TooFewUploads(RuntimeError):
    """Fewer good uploads than `federation.min_devices`, or too few for every cluster."""


class TransportFailed(RuntimeError):
    """The network engine ended without a result."""


@dataclass(frozen=True)
class ShardInfo:
    """One file of a package: its generated name, its length in bytes, its SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Content:
    """What the shards of an upload hold; both sides agree on every field.

    weights     the model
    adapter     low-rank updates of the matrices inside the layers, of `rank`
    logprobs    the `top_k` likeliest of `vocabulary` tokens at `rows` positions of the public text
                of revision `text`
    """

    kind: str = "weights"
    rank: int = 0
    top_k: int = 0
    rows: int = 0
    vocabulary: int = 0
    text: str = ""


@dataclass(frozen=True)
class Manifest:
    """The facts of one upload; `ties` maps a name to the name whose tensor it shares.

    privacy: epsilon, delta, noise, clip, rate and steps of a differentially private training; empty
    where there was none.
    """

    protocol: int
    device: str
    architecture: str
    base_revision: str
    tokenizer_fingerprint: str
    tokens: int
    codec: str
    ties: Mapping[str, str]
    shards: tuple[ShardInfo, ...]
    embedding_sha256: str
    seed: int
    versions: Mapping[str, str]
    content: Content = field(default_factory=Content)
    privacy: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """The same facts give the same bytes: no clock, no host name."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read a manifest; ValueError names the first key missing, unknown or of a wrong type."""
        try:
            facts = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"manifest: must be JSON, got {type(error).__name__}") from None
        _expect_keys(facts, {one.name for one in fields(cls)}, "manifest")
        for key, wanted in _TYPES.items():
            _expect_type(facts[key], wanted, f"manifest: {key}")
        for key in ("ties", "versions"):
            for name, value in facts[key].items():
                _expect_type(value, str, f"manifest: {key}[{name!r}]")
        _expect_keys(
            facts["privacy"], set(PRIVACY) if facts["privacy"] else set(), "manifest: privacy"
        )
        for name, value in facts["privacy"].items():
            _expect_type(value, float, f"manifest: privacy[{name!r}]")
        read = {
            "shards": tuple(map(_shard, facts["shards"])),
            "content": _content(facts["content"]),
        }
        return cls(**{**facts, **read})


_TYPES: dict[str, type] = {
    "protocol": int,
    "device": str,
    "architecture": str,
    "base_revision": str,
    "tokenizer_fingerprint": str,
    "tokens": int,
    "codec": str,
    "ties": dict,
    "shards": list,
    "embedding_sha256": str,
    "seed": int,
    "versions": dict,
    "content": dict,
    "privacy": dict,
}


def _expect_type(value: object, wanted: type, what: str) -> None:
    # a bool is an int in Python, but True is no number of tokens
    if type(value) is not wanted:
        raise ValueError(f"{what} must be {wanted.__name__}, got {type(value).__name__}")


def _expect_keys(facts: object, wanted: set[str], what: str) -> None:
    if not isinstance(facts, dict):
        raise ValueError(f"{what}: must be an object, got {type(facts).__name__}")
    for key in sorted(wanted - facts.keys()):
        raise ValueError(f"{what}: key {key!r} is missing")
    for key in sorted(map(str, facts.keys() - wanted)):
        raise ValueError(f"{what}: unknown key {key[:64]!r}")


def _shard(facts: dict[str, Any]) -> ShardInfo:
    _expect_keys(facts, {"name", "bytes", "sha256"}, "manifest: shard")
    for key, wanted in {"name": str, "bytes": int, "sha256": str}.items():
        _expect_type(facts[key], wanted, f"manifest: shard {key}")
    return ShardInfo(**facts)


def _content(facts: dict[str, Any]) -> Content:
    kinds = {one.name: type(one.default) for one in fields(Content)}
    _expect_keys(facts, set(kinds), "manifest: content")
    for key, wanted in kinds.items():
        _expect_type(facts[key], wanted, f"manifest: content {key}")
    return Content(**facts)


@dataclass(frozen=True)
class TrainedDevice:
    """What training on a device returns. state, base: name -> tensor; embedding [r] float32.

    state and base hold what `content` says travels; base_revision is that of the common start.
    """

    device: str
    architecture: str
    state: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    base_revision: str
    embedding: Tensor
    tokens: int
    tokenizer_fingerprint: str
    seed: int
    content: Content = field(default_factory=Content)
    privacy: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceUpdate:
    """An upload that passed the gate: folder, facts, embedding [r] float32 of length 1.

    `norms` holds |m_n - base| of every tensor: the gate's last check compares them.
    """

    folder: Path
    manifest: Manifest
    embedding: Tensor
    norms: Mapping[str, float] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The device's name, as the transport knows it."""
        return self.manifest.device

    @property
    def architecture(self) -> str:
        """The architecture's name, one of those the server allows."""
        return self.manifest.architecture

    @property
    def tokens(self) -> int:
        """Tokens the device says it trained on."""
        return self.manifest.tokens
