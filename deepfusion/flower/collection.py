"""One collection as files: what is wanted of whom, and how far each device is.

network/wanted.json    Wanted: written by `serve`, read by the process that collects
collection.json        Standing of every device: written by that process, shown by `serve`
inbox/<device>         an upload while it comes in; moved to uploads/<device> once it is whole
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import files
from ..messages import Manifest, UploadRefused
from ..wire.package import EMBEDDING, MANIFEST, shard_name

# waiting: not seen yet; late: seen, not ready at the deadline; unavailable: seen, then gone, or
# never seen at all when the deadline came
STATUSES = (
    "waiting",
    "training",
    "uploading",
    "done",
    "late",
    "refused",
    "failed",
    "unavailable",
)


@dataclass(frozen=True)
class SentFile:
    """A file that goes down to a device: its name there, where it lies here."""

    name: str
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class WantedDevice:
    """One device of a collection; node 0: whoever says hello under this name (plaintext alone)."""

    device: str
    node: int
    architecture: str
    files: tuple[SentFile, ...]


@dataclass(frozen=True)
class Limits:
    """What an announced upload must keep before a byte of it is fetched; see `wire.gate`."""

    base_revision: str
    max_bytes: int


@dataclass(frozen=True)
class Wanted:
    """Everything the collecting process needs to know."""

    run_folder: str
    devices: tuple[WantedDevice, ...]
    limits: Mapping[str, Limits]
    config: Mapping[str, Any]
    config_hash: str
    deadline_seconds: float
    shard_bytes: int
    embedding_bytes: int
    probe_seconds: float

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run_folder)

    def write(self, path: Path) -> None:
        """Write it down for the collecting process."""
        files.write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Wanted:
        """What `write` wrote."""
        facts = json.loads(path.read_text())
        devices = tuple(
            WantedDevice(**{**one, "files": tuple(SentFile(**sent) for sent in one["files"])})
            for one in facts.pop("devices")
        )
        limits = {name: Limits(**one) for name, one in facts.pop("limits").items()}
        return cls(devices=devices, limits=limits, **facts)


@dataclass
class Standing:
    """How far one device is, and what it cost so far."""

    status: str = "waiting"
    reason: str = ""
    node: str = ""
    seconds: float = 0.0
    retries: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_wasted: int = 0
    shards: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for the screen, without the device's name."""
        return " ".join(part for part in (self.status, self.shards, self.reason) if part)


def write_standings(run_folder: Path, standings: Mapping[str, Standing]) -> None:
    """collection.json, whole or not at all."""
    facts = {device: asdict(one) for device, one in standings.items()}
    files.write_json(run_folder / "collection.json", facts)


def read_standings(run_folder: Path) -> dict[str, Standing]:
    """The devices' standings; empty where nothing was collected over a network."""
    path = run_folder / "collection.json"
    if not path.exists():
        return {}
    return {device: Standing(**one) for device, one in json.loads(path.read_text()).items()}


def parcels(
    sent: Sequence[SentFile], held: Sequence[str], begun: Mapping[str, int], limit: int
) -> list[list[dict[str, Any]]]:
    """What a device lacks, cut into messages of at most `limit` bytes; at least one, maybe empty.

    begun: sha256 -> bytes that lie on the device already.
    """
    found: list[list[dict[str, Any]]] = [[]]
    room = limit
    for one in sent:
        if one.sha256 in held:
            continue
        # the last byte is sent again: with it comes the check of the whole file
        offset = min(int(begun.get(one.sha256, 0)), max(one.bytes - 1, 0))
        while offset < one.bytes:
            if room == 0:
                found.append([])
                room = limit
            length = min(room, one.bytes - offset)
            part = {"sha256": one.sha256, "bytes": one.bytes, "offset": offset, "length": length}
            found[-1].append(part)
            offset, room = offset + length, room - length
    return found


def announced(text: str, device: WantedDevice, wanted: Wanted) -> Manifest:
    """The manifest of an upload that is worth fetching. Raises UploadRefused with the reason.

    The gate checks everything again once the upload lies on the disk; this keeps what is too large,
    or somebody else's, from being fetched at all.
    """
    try:
        manifest = Manifest.from_json(text)
    except ValueError as fault:
        raise UploadRefused(str(fault)) from None
    limits = wanted.limits[device.architecture]
    agreed = [
        ("device", device.device, manifest.device),
        ("architecture", device.architecture, manifest.architecture),
        ("base revision", limits.base_revision, manifest.base_revision),
    ]
    for what, right, got in agreed:
        if right != got:
            raise UploadRefused(f"{what} must be {right!r}, got {got[:80]!r}")
    count = len(manifest.shards)
    most = 1 + 2 * limits.max_bytes // wanted.shard_bytes
    if not 1 <= count <= most:
        raise UploadRefused(f"upload must have 1 to {most} shards, got {count}")
    for index, shard in enumerate(manifest.shards):
        if shard.name != (right := shard_name(index, count)):
            raise UploadRefused(f"shard {index + 1} must be named {right}, got {shard.name[:80]!r}")
        if not 0 < shard.bytes <= wanted.shard_bytes:
            raise UploadRefused(
                f"shard {shard.name} must have 1 to {wanted.shard_bytes} bytes, got {shard.bytes}"
            )
    if (total := sum(shard.bytes for shard in manifest.shards)) > limits.max_bytes:
        raise UploadRefused(f"upload must have at most {limits.max_bytes} bytes, got {total}")
    return manifest


class Inbox:
    """Where one device's upload comes in; a received shard is never asked for again."""

    def __init__(self, run_folder: Path, device: str) -> None:
        self.folder = run_folder / "inbox" / device
        self._target = run_folder / "uploads" / device

    def has_all(self, text: str, manifest: Manifest) -> bool:
        """Whether this very package came in before: a server killed since has not noted it."""
        path = self._target / MANIFEST
        return (
            path.is_file()
            and path.read_bytes() == text.encode()
            and all((self._target / shard.name).is_file() for shard in manifest.shards)
        )

    def begin(self, manifest: str, embedding: bytes) -> None:
        """Note what is coming; shards of another package are thrown away."""
        path = self.folder / MANIFEST
        if path.exists() and path.read_text() != manifest:
            files.remove(self.folder)
        files.write_bytes(self.folder / EMBEDDING, embedding)
        files.write_text(path, manifest)

    def missing(self, manifest: Manifest) -> list[int]:
        """Indices of shards that are not here; one that has its name is whole and checked."""
        names = enumerate(shard.name for shard in manifest.shards)
        return [index for index, name in names if not (self.folder / name).exists()]

    def finish(self) -> None:
        """The upload is whole: give it its place."""
        files.remove(self._target)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self.folder.replace(self._target)
