"""What is asked of one device, in order, and what becomes of it when it fails, lies or vanishes.

A conversation is a generator: it yields a message and is sent the answer, or is thrown the fault.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict

from ..messages import PROTOCOL, Manifest, UploadRefused
from ..wire.package import receive_shard
from . import records
from .collection import Inbox, SentFile, Standing, Wanted, WantedDevice, announced, parcels

SHARD_TRIES = 3
CRASHES = 2
# a device that is lost more often costs more than it brings: each time it is sent what it lacks
RETURNS = 50
# Flower's error codes: the reply, or the node, is gone; the message can be asked again
GONE = (3, 4, 5)
RAISED, CRASHED = 2, 8
OURS = re.compile(r"DeviceFailed'>:<'(\w{1,64} \d{1,6})'>", re.ASCII)


class Gone(Exception):
    """The device, or its answer, is lost; it may come back."""


class Failed(Exception):
    """The device answered that it failed; the message is a class and a number."""


ENDS: Mapping[type[Exception], str] = {
    Gone: "unavailable",
    Failed: "failed",
    UploadRefused: "refused",
}


@dataclass
class Ask:
    """One message to a device."""

    kind: str
    facts: Mapping[str, Any]
    pieces: Iterator[bytes] = field(default_factory=lambda: iter(()))
    length: int = 0


Conversation = Generator[Ask, RecordDict, None]


def converse(device: WantedDevice, wanted: Wanted, standing: Standing) -> Conversation:
    """What is asked of one device, in order, and a last word; resumed by beginning again."""
    verdict = "received"
    try:
        yield from _exchange(device, wanted, standing)
        standing.status, standing.shards = "done", ""
    except ValueError as refusal:
        standing.status, standing.reason = "refused", str(refusal)
        verdict = f"refused: {refusal}"
    yield Ask(records.CLOSE, {"verdict": verdict})


def _exchange(device: WantedDevice, wanted: Wanted, standing: Standing) -> Conversation:
    said = records.facts_of((yield Ask(records.HELLO, hello_facts(device, wanted))))
    _check_hello(said, device)
    standing.versions = _versions(said)
    for kind, facts, parts in _downward(device, wanted, said):
        standing.status = "training" if kind == records.TRAIN else standing.status
        length = sum(part["length"] for part in parts)
        pieces = _read(device.files, parts)
        answer = yield Ask(kind, {**facts, "parts": parts}, pieces, length)
        standing.bytes_down += length
    text = records.facts_of(answer).get("manifest")
    embedding = b"".join(records.pieces_of(answer))
    if not isinstance(text, str) or len(embedding) != wanted.embedding_bytes:
        raise UploadRefused(
            f"manifest must come with {wanted.embedding_bytes} bytes of embedding, "
            f"got {len(embedding)}"
        )
    manifest = announced(text, device, wanted)
    standing.status = "uploading"
    inbox = Inbox(wanted.folder, device.device)
    if inbox.has_all(text, manifest):
        return
    inbox.begin(text, embedding)
    standing.bytes_up += len(text.encode()) + len(embedding)
    named = hashlib.sha256(text.encode()).hexdigest()
    for index in inbox.missing(manifest):
        standing.shards = f"{index} of {len(manifest.shards)} shards"
        yield from _fetch(index, named, manifest, inbox, standing)
    inbox.finish()


def hello_facts(device: WantedDevice, wanted: Wanted) -> dict[str, Any]:
    return {
        "protocol": PROTOCOL,
        "device": device.device,
        "config_hash": wanted.config_hash,
        "architectures": sorted(wanted.limits),
        "base_revisions": {name: one.base_revision for name, one in wanted.limits.items()},
    }


def _check_hello(said: Mapping[str, Any], device: WantedDevice) -> None:
    if said.get("protocol") != PROTOCOL:
        raise UploadRefused(f"protocol must be {PROTOCOL}, got {str(said.get('protocol'))[:20]}")
    if said.get("device") != device.device or said.get("refusal"):
        raise UploadRefused(
            f"node must be {device.device}, says it is {str(said.get('device'))[:40]!r}"
        )


def _versions(said: Mapping[str, Any]) -> dict[str, str]:
    found = said.get("versions")
    pairs = found.items() if isinstance(found, dict) else ()
    return {str(name)[:40]: str(one)[:40] for name, one in list(pairs)[:20]}


def _downward(
    device: WantedDevice, wanted: Wanted, said: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """(kind, facts, parts) of each message that carries files; the last one is `train`."""
    held, begun = said.get("held"), said.get("begun")
    if (
        not isinstance(held, list)
        or not isinstance(begun, dict)
        or not all(type(one) is int and one >= 0 for one in begun.values())
    ):
        raise UploadRefused("hello must say which files are held and begun, got none")
    plan = parcels(device.files, held, begun, wanted.shard_bytes)
    for parts in plan[:-1]:
        yield records.BASE, {}, parts
    facts = {
        "config": wanted.config,
        "architecture": device.architecture,
        "files": {one.name: one.sha256 for one in device.files},
    }
    yield records.TRAIN, facts, plan[-1]


def _read(sent: tuple[SentFile, ...], parts: list[dict[str, Any]]) -> Iterator[bytes]:
    places = {one.sha256: Path(one.path) for one in sent}
    for part in parts:
        yield from records.read_pieces(places[part["sha256"]], part["offset"], part["length"])


def _fetch(
    index: int, named: str, manifest: Manifest, inbox: Inbox, standing: Standing
) -> Conversation:
    """One shard, streamed to disk and checked; asked again where it does not match."""
    said = manifest.shards[index]
    for left in reversed(range(SHARD_TRIES)):
        answer = yield Ask(records.SHARD, {"index": index, "manifest": named})
        try:
            receive_shard(
                records.pieces_of(answer), inbox.folder, index, len(manifest.shards), said
            )
        except UploadRefused:
            standing.bytes_wasted += said.bytes
            standing.retries += 1
            if not left:
                raise
        else:
            standing.bytes_up += said.bytes
            return


class Talk:
    """One device's conversation: begun when its node is there, begun again when it comes back."""

    def __init__(self, device: WantedDevice, wanted: Wanted, standing: Standing) -> None:
        self.device = device
        self.standing = standing
        self.node = device.node
        self.pending = ""
        self.since = 0.0
        self._wanted = wanted
        self._script: Conversation | None = None
        self._crashes = self._returns = 0
        if device.node:
            standing.node = str(device.node)

    @property
    def is_open(self) -> bool:
        """Whether an answer may still come."""
        return self._script is not None or self.standing.status in (
            "waiting",
            "training",
            "uploading",
            "unavailable",
        )

    @property
    def is_idle(self) -> bool:
        """Whether the conversation can be begun."""
        return self.is_open and self._script is None

    def begin(self) -> Ask | None:
        """The first message."""
        if self.standing.status == "unavailable":
            self._returns += 1
            if self._returns > RETURNS:
                self.close("failed", f"lost more than {RETURNS} times")
                return None
            self.standing.status, self.standing.reason = "waiting", ""
            self.standing.shards = ""
            self.standing.retries += 1
        self._script = converse(self.device, self._wanted, self.standing)
        return self._step(lambda script: next(script))

    def take(self, reply: Message) -> Ask | None:
        """The next message after a reply; None where there is none."""
        self.pending = ""
        if not reply.has_error():
            content = reply.content
            return self._step(lambda script: script.send(content))
        fault = _fault(reply.error.code, reply.error.reason)
        if reply.error.code == CRASHED and self._crashes < CRASHES:
            self._crashes += 1
            fault = Gone("process killed")
        return self._step(lambda script: script.throw(fault))

    def lost(self) -> None:
        """The pending message went to a process that is no more."""
        self.pending = ""
        self._step(lambda script: script.throw(Gone("restarted")))

    def refuse(self, reason: str) -> Ask | None:
        """The pending message was answered with what is no answer; the last word to say so."""
        self.pending = ""
        return self._step(lambda script: script.throw(UploadRefused(reason)))

    def close(self, status: str, reason: str) -> None:
        """End it: nothing is asked any more."""
        self._script = None
        self.standing.status, self.standing.reason = status, reason

    def _step(self, move: Callable[[Conversation], Ask]) -> Ask | None:
        assert self._script is not None, "a reply belongs to a conversation that was begun"
        was_closed = self.standing.status in ("done", "refused")
        try:
            return move(self._script)
        except StopIteration:
            self._script = None
        except (Gone, Failed, UploadRefused) as end:
            self._script = None
            # how the farewell went is of no weight: everything is here, or refused
            if not was_closed:
                self.close(ENDS[type(end)], str(end))
        return None


def _fault(code: int, reason: str) -> Exception:
    """A device's own words are believed only where they have the form that we gave them."""
    if code in GONE:
        return Gone("node or answer lost")
    ours = OURS.search(reason)
    return Failed(ours[1] if code == RAISED and ours else f"flower error {code}")
