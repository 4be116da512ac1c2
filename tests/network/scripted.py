"""A device that answers from a package on disk, and the talk with it: no process, no network."""

import hashlib
import json
from pathlib import Path
from typing import Any

from flwr.app import Error, RecordDict

from deepfusion.flower import records
from deepfusion.flower.collection import Limits, SentFile, Standing, Wanted, WantedDevice
from deepfusion.flower.talk import Ask, Talk
from tests.driver.uploads import DIMENSIONS, SHARD_BYTES

NODE = 77


def wanted(folder: Path, *, max_bytes: int = 1 << 20, deadline: float = 60.0) -> Wanted:
    start = folder / "start"
    start.write_bytes(b"the common start" * 400)
    sha256 = hashlib.sha256(start.read_bytes()).hexdigest()
    sent = (SentFile("starts/start.safetensors", str(start), 6400, sha256),)
    base = json.loads((folder / "package" / "manifest.json").read_text())["base_revision"]
    return Wanted(
        run_folder=str(folder / "run"),
        devices=(WantedDevice("device-00", NODE, "toy", sent),),
        limits={"toy": Limits(base, max_bytes)},
        config={"run": {}},
        config_hash="0",
        deadline_seconds=deadline,
        shard_bytes=SHARD_BYTES,
        embedding_bytes=DIMENSIONS + 4,
        probe_seconds=60.0,
    )


class Reply:
    """What a conversation reads of a message: one made outside a run of Flower cannot be."""

    def __init__(self, said: RecordDict | Error) -> None:
        self.content = self.error = said

    def has_error(self) -> bool:
        return isinstance(self.error, Error)


class Device:
    """Answers as a device does, from a package on disk; `faults` go first, by kind of message."""

    def __init__(self, package: Path, **faults: list[Any]) -> None:
        self.package = package
        self.faults = faults
        self.asked: list[str] = []
        self.received = b""
        self.verdict = ""

    def answer(self, ask: Ask) -> Any:
        content = records.pack(ask.facts, ask.pieces)
        name = ask.kind.rpartition(".")[2]
        facts = records.facts_of(content)
        self.asked.append(f"{name} {facts['index']}" if name == "shard" else name)
        self.received += b"".join(records.pieces_of(content))
        if self.faults.get(name):
            return Reply(self.faults[name].pop(0))
        content = getattr(self, name)(facts)
        # a method may put a fault in the place of what it was about to say
        return Reply(self.faults[name].pop(0) if self.faults.get(name) else content)

    def hello(self, facts: dict[str, Any]) -> RecordDict:
        said = {"protocol": 1, "device": "device-00", "held": [], "begun": {}, "versions": {}}
        return records.pack(said)

    def base(self, facts: dict[str, Any]) -> RecordDict:
        return records.pack({})

    def train(self, facts: dict[str, Any]) -> RecordDict:
        text = (self.package / "manifest.json").read_text()
        return records.pack({"manifest": text}, [(self.package / "embedding.bin").read_bytes()])

    def shard(self, facts: dict[str, Any]) -> RecordDict:
        names = sorted(path.name for path in self.package.glob("*.safetensors"))
        return records.pack({}, records.read_pieces(self.package / names[facts["index"]]))

    def close(self, facts: dict[str, Any]) -> RecordDict:
        self.verdict = facts["verdict"]
        return records.pack({})


def talk_to(device: Device, what: Wanted) -> Standing:
    standing = Standing()
    talk = Talk(what.devices[0], what, standing)
    while talk.is_idle:
        ask = talk.begin()
        while ask is not None:
            ask = talk.take(device.answer(ask))
        if standing.status == "unavailable" and standing.retries > 5:
            break
    return standing
