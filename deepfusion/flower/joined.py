"""What a device does when it is asked, without a word about the network.

    <run.output>/received/<sha256>     files of the server, whole once they have their name
    <run.output>/uploads/<device>      the package: written once, the same bytes whenever asked

Training needs torch, the rest does not: every message is a process of its own on the device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fcntl import LOCK_EX, LOCK_UN, flock
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import config as configuration
from .. import files
from ..config import Config
from ..messages import PROTOCOL, device_name

PACKAGES = ("torch", "transformers", "safetensors", "zstandard", "flwr")


@dataclass(frozen=True)
class Place:
    """What a device decides for itself, written by `deepfusion join` for its message processes."""

    device: int
    output: str
    run_device: str
    threads: int
    data: str

    @classmethod
    def of(cls, config: Config) -> Place:
        """The place that a device's own file describes."""
        return cls(
            device=config.network.device,
            output=str(Path(config.run.output).resolve()),
            run_device=config.run.device,
            threads=config.run.threads,
            data=str(Path(config.network.data).resolve()) if config.network.data else "",
        )

    @property
    def folder(self) -> Path:
        """Where the device keeps what it made and received."""
        return Path(self.output)

    @property
    def name(self) -> str:
        """The device's name."""
        return device_name(self.device)

    @property
    def upload(self) -> Path:
        """The folder of the device's package."""
        return self.folder / "uploads" / self.name

    def write(self) -> Path:
        """Write it down for the processes that answer messages."""
        path = self.folder / "network" / "place.json"
        files.write_json(path, asdict(self))
        return path

    @classmethod
    def read(cls, path: Path) -> Place:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text()))


@contextmanager
def alone(place: Place) -> Iterator[None]:
    """One process at a time works in the device's folder: a lost message's may still be running."""
    path = place.folder / "network" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        flock(stream, LOCK_EX)
        try:
            yield
        finally:
            flock(stream, LOCK_UN)


def hello(place: Place, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Who this is and which of the server's files it holds already, whole or in part."""
    received = sorted((place.folder / "received").glob("*"))
    begun = {
        path.name.removesuffix(files.PARTIAL): path.stat().st_size
        for path in received
        if path.name.endswith(files.PARTIAL)
    }
    refusal = ""
    if asked.get("protocol") != PROTOCOL:
        refusal = "protocol"
    elif asked.get("device") not in (None, place.name):
        refusal = "device"
    return {
        "protocol": PROTOCOL,
        "device": place.name,
        "held": [path.name for path in received if not path.name.endswith(files.PARTIAL)],
        "begun": begun,
        "refusal": refusal,
        "versions": {name: version(name) for name in PACKAGES},
    }


def store(place: Place, parts: Iterable[Mapping[str, Any]], pieces: Iterable[bytes]) -> None:
    """Append parts of the server's files; a file that is whole must be the one it is named for.

    parts: sha256, bytes of the whole file, offset, length of this part. Raises ValueError.
    """
    stream = iter(pieces)
    rest = b""
    for part in parts:
        path = place.folder / "received" / str(part["sha256"])
        partial = path.with_name(path.name + files.PARTIAL)
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as out:
            if (held := out.tell()) < part["offset"]:
                raise ValueError(f"file {path.name[:12]} ends at {held}, got {part['offset']} on")
            # a part sent twice, or one after a kill in the middle of a write
            out.truncate(part["offset"])
            left = int(part["length"])
            while left > 0:
                rest = rest or next(stream, b"")
                if not rest:
                    raise ValueError(f"file {path.name[:12]} must have {left} bytes more, got none")
                out.write(rest[:left])
                rest, left = rest[left:], left - len(rest[:left])
        if partial.stat().st_size == part["bytes"]:
            if (got := files.sha256_of(partial)) != part["sha256"]:
                files.remove(partial)
                raise ValueError(f"file must have sha256 {path.name[:12]}, got {got[:12]}")
            partial.replace(path)


def resolved(place: Place, tables: Mapping[str, Any], tokenizer: Path) -> Config:
    """The server's configuration with what this device decides for itself. Raises ConfigError."""
    given = {name: dict(values) for name, values in tables.items()}
    given["run"] |= {
        "output": place.output,
        "device": place.run_device,
        "threads": place.threads,
    }
    # the devices' tokenizer came as files; the server's own is none of a device's business
    given["data"]["tokenizer"] = ""
    if given["devices"].get("tokenizer"):
        given["devices"]["tokenizer"] = str(tokenizer)
    if place.data and given["data"]["private"] == "shares":
        given["data"]["path"] = place.data
    elif given["data"]["private"] == "own":
        given["data"] |= {"source": "files", "path": place.data}
    return configuration.resolve(given, (), "from the server")


def train(place: Place, asked: Mapping[str, Any]) -> Path:
    """Train and pack, or find the package of the same inputs; the package's folder.

    asked: config (tables), architecture, files (name -> sha256). Raises what training raises.
    """
    import torch

    from ..data.prepared import documents_of
    from ..device.gather import DeviceJob, gather

    names: Mapping[str, str] = asked["files"]
    for name, sha256 in names.items():
        _put(place, name, sha256)
    config = resolved(place, asked["config"], place.folder / "tokenizer")
    if place.threads:
        torch.set_num_threads(place.threads)
    idf, public = (
        place.folder / f"starts/{name}.safetensors"
        if f"starts/{name}.safetensors" in names
        else None
        for name in ("idf", "public")
    )
    job = DeviceJob(
        device=place.name,
        architecture=str(asked["architecture"]),
        documents=documents_of(config, place.device, place.data),
        start=place.folder / "starts" / "start.safetensors",
        tokenizer=place.folder / "tokenizer",
        config=config,
        run_folder=place.folder,
        idf=idf,
        public=public,
    )
    return gather([job])[0]


def _put(place: Place, name: str, sha256: str) -> None:
    """Give a received file the name under which training looks for it."""
    folder, _, leaf = name.partition("/")
    if folder not in ("starts", "tokenizer") or not leaf or leaf != Path(leaf).name:
        raise ValueError(f"file {name[:80]!r} must lie in starts/ or tokenizer/")
    target = place.folder / folder / leaf
    if target.exists() and files.sha256_of(target) == sha256:
        return
    with files.whole(target) as partial:
        partial.hardlink_to(place.folder / "received" / sha256)
