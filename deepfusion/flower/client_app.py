"""The device's half of the protocol: each message is a process that lives for one answer.

The text of an exception may quote private data, and Flower sends it: what leaves the device is the
exception's class and number; the text goes to <run.output>/network/device.log.
"""

from __future__ import annotations

import errno
import hashlib
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from .. import files
from . import joined, records
from .joined import Place

app = ClientApp()


class DeviceFailed(RuntimeError):
    """All that the server learns of a fault on the device: `<class> <number>`."""


@contextmanager
def _nothing_quoted(place: Place) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        # a full disk must not put another exception, with a text of its own, in this one's place
        with suppress(OSError), (place.folder / "network" / "device.log").open("a") as log:
            log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')}\n{text}\n")
        number = getattr(error, "errno", None)
        if isinstance(error, files.DiskFull):
            number = errno.ENOSPC
        raise DeviceFailed(f"{type(error).__name__} {number or 0}") from None


def _place(context: Context) -> Place:
    return Place.read(Path(str(context.node_config["place"])))


def _answer(message: Message, facts: dict[str, Any], pieces: Any = ()) -> Message:
    return Message(records.pack(facts, pieces), reply_to=message)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who this is, what it holds; a mismatch ends here."""
    place = _place(context)
    with _nothing_quoted(place):
        return _answer(message, joined.hello(place, records.facts_of(message.content)))


@app.query("base")
def base(message: Message, context: Context) -> Message:
    """Part of the common start, for which one message is too small."""
    place = _place(context)
    with _nothing_quoted(place), joined.alone(place):
        facts = records.facts_of(message.content)
        joined.store(place, facts["parts"], records.pieces_of(message.content))
        return _answer(message, {})


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train and pack; the answer is the manifest and the embedding, no weights."""
    place = _place(context)
    with _nothing_quoted(place), joined.alone(place):
        facts = records.facts_of(message.content)
        joined.store(place, facts["parts"], records.pieces_of(message.content))
        folder = joined.train(place, facts)
        manifest = (folder / "manifest.json").read_text()
        embedding = (folder / "embedding.bin").read_bytes()
        return _answer(message, {"manifest": manifest}, [embedding])


@app.query("shard")
def shard(message: Message, context: Context) -> Message:
    """One file of the package, the same bytes however often it is asked for."""
    place = _place(context)
    with _nothing_quoted(place):
        asked = records.facts_of(message.content)
        text = (place.upload / "manifest.json").read_bytes()
        # NOTE: a package made anew since `train` is another one; its shards must not be mixed in.
        if hashlib.sha256(text).hexdigest() != asked["manifest"]:
            raise ValueError("shard: the package is no longer the one that was announced")
        name = json.loads(text)["shards"][int(asked["index"])]["name"]
        return _answer(message, {}, records.read_pieces(place.upload / name))


@app.query("close")
def close(message: Message, context: Context) -> Message:
    """The server has everything, or refused it; the package may be removed by hand from here on."""
    place = _place(context)
    with _nothing_quoted(place):
        verdict = records.facts_of(message.content)
        files.write_json(place.folder / "network" / "verdict.json", verdict)
        return _answer(message, {})
