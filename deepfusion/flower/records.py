"""Facts and bytes in one message: a JSON text, and arrays of uint8 that nobody takes for tensors.

    facts   ConfigRecord {"json": text}
    bytes   ArrayRecord  {"00000": 1 MiB, "00001": 1 MiB, ..}

Flower holds a message twice while it puts it together, and a piece several times while it comes in:
pieces are small, and forgotten one by one as they are written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

PIECE_BYTES = 1 << 20
# a manifest of 1 MiB, quoted; parsed it takes twenty times its length
FACTS_CHARACTERS = 4 << 20
HELLO, BASE, TRAIN, SHARD, CLOSE = (
    "query.hello",
    "query.base",
    "train",
    "query.shard",
    "query.close",
)


def pack(facts: Mapping[str, Any], pieces: Iterable[bytes] = ()) -> RecordDict:
    """The content of one message."""
    content = RecordDict({"facts": ConfigRecord({"json": json.dumps(facts, sort_keys=True)})})
    arrays = {
        f"{index:05d}": Array(dtype="uint8", shape=(len(one),), stype="safetensors", data=one)
        for index, one in enumerate(pieces)
    }
    if arrays:
        content["bytes"] = ArrayRecord(arrays, keep_input=False)
    return content


def facts_of(content: RecordDict) -> dict[str, Any]:
    """The facts of a message; ValueError for what is no JSON object."""
    record = content.config_records.get("facts")
    text = record.get("json") if record is not None else None
    if not isinstance(text, str):
        raise ValueError("message: facts must be JSON text, got none")
    if len(text) > FACTS_CHARACTERS:
        raise ValueError(
            f"message: facts must be at most {FACTS_CHARACTERS} characters, got {len(text)}"
        )
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("message: facts must be JSON") from None
    if not isinstance(facts, dict):
        raise ValueError(f"message: facts must be an object, got {type(facts).__name__}")
    return facts


def pieces_of(content: RecordDict) -> Iterator[bytes]:
    """The bytes of a message in their order; a piece is forgotten once the next one is asked for.

    Other array types than `pack` writes are a ValueError: their declared shape means nothing.
    """
    record = content.array_records.get("bytes")
    if record is None:
        return
    for name in sorted(record.keys()):
        array = record[name]
        del record[name]
        if array.stype != "safetensors" or array.dtype != "uint8":
            raise ValueError(f"message: bytes must be uint8, got {array.dtype[:32]!r}")
        yield array.data


def read_pieces(path: Path, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
    """A part of a file in pieces."""
    left = path.stat().st_size - offset if length is None else length
    with path.open("rb") as stream:
        stream.seek(offset)
        while left > 0 and (piece := stream.read(min(PIECE_BYTES, left))):
            left -= len(piece)
            yield piece
