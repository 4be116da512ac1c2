"""The gate's table, row by row, through a whole round: refused, audited, weighed; its twin passes.

Details of each check are in test_gate.py and test_gate_tensors.py; here every row of the table goes
with a healthy upload of another device, which must pass beside it.
"""

import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from deepfusion.ledger import Ledger
from deepfusion.messages import TooFewUploads
from deepfusion.wire.audit import Audit, verify
from deepfusion.wire.expected import Expected
from deepfusion.wire.intake import take_in
from deepfusion.wire.package import MANIFEST

from .uploads import edit_shard, expected, packed, reseal, rewrite

HEALTHY, HOSTILE = "device-00", "device-01"


@dataclass(frozen=True)
class Row:
    """How an upload of HOSTILE is broken, and what the refusal says of it."""

    spoil: Callable[[Path], object]
    reason: str
    codec: str = "delta-int8"
    limits: dict[str, Any] = field(default_factory=dict)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def shards_of(folder: Path) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["shards"]
    return shards


def flip_a_bit(folder: Path) -> None:
    content = bytearray(first_shard(folder).read_bytes())
    content[-1] ^= 1
    first_shard(folder).write_bytes(content)


def swap_shards(folder: Path) -> None:
    one, two, *rest = shards_of(folder)
    rewrite(folder, shards=[two, one, *rest])


def bomb(folder: Path) -> None:
    frame = zstandard.ZstdCompressor(19).compress(bytes(64 << 20))
    hostile = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
    key = "layer.bias#zstd#0"
    edit_shard(folder, lambda tensors: tensors.update({key: hostile}), key)


def pickled(folder: Path) -> None:
    first_shard(folder).write_bytes(pickle.dumps({"a": 1}))
    reseal(folder)


def plant(key: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        edit_shard(folder, lambda tensors: tensors.update({key: tensor}), "scale#q#0")

    return spoil


def drop_scale(folder: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["scale#q#0"], tensors["scale#scale#0"]

    edit_shard(folder, drop, "scale#q#0")


def embedding_of(content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "embedding.bin").write_bytes(content)
        reseal(folder)

    return spoil


def link(folder: Path) -> None:
    outside = folder.parent.parent / "outside"
    first_shard(folder).rename(outside)
    first_shard_path = folder / shards_of(folder)[0]["name"]
    first_shard_path.symlink_to(outside)


def path_in_a_name(folder: Path) -> None:
    shards = shards_of(folder)
    rewrite(folder, shards=[{**shards[0], "name": "../x"}, *shards[1:]])


NAN = torch.tensor([float("nan")]).half()
ROWS = {
    "too large": Row(
        lambda folder: (folder / "model-00098-of-00099.safetensors").write_bytes(bytes(1 << 23)),
        "upload must have at most",
    ),
    "too many shards": Row(
        lambda folder: rewrite(folder, shards=shards_of(folder) * 2000), "must have 1 to"
    ),
    "hash differs": Row(flip_a_bit, "must have sha256"),
    "length differs": Row(
        lambda folder: first_shard(folder).write_bytes(first_shard(folder).read_bytes() + b"x"),
        "bytes, got",
    ),
    "shard missing": Row(lambda folder: first_shard(folder).unlink(), "is missing"),
    "shard repeated": Row(
        lambda folder: rewrite(folder, shards=[shards_of(folder)[0], *shards_of(folder)[:-1]]),
        "shard 2 must be named",
    ),
    "shards out of order": Row(swap_shards, "shard 1 must be named"),
    "zstd bomb": Row(bomb, "unpacks to more than 130 bytes", "bf16", {"shard_bytes": 1 << 20}),
    "pickle": Row(pickled, "must begin as safetensors do"),
    "unknown architecture": Row(
        lambda folder: rewrite(folder, architecture="gpt-17"), "architecture must be one of toy"
    ),
    "name missing": Row(drop_scale, "tensor 'scale' is missing"),
    "name extra": Row(plant("evil#q#0", torch.zeros(1)), "tensor 'evil' does not belong to toy"),
    "other shape": Row(plant("scale#q#0", torch.ones(2, dtype=torch.int8)), "must be torch.int8"),
    "other dtype": Row(plant("scale#q#0", torch.ones(1)), "must be torch.int8"),
    "tie that is none": Row(
        lambda folder: rewrite(folder, ties={"head.weight": "embed.weight", "layer.bias": "scale"}),
        "ties must be",
    ),
    "not finite": Row(plant("scale#scale#0", NAN), "non-finite block scales"),
    "negative scale": Row(plant("scale#scale#0", -NAN.nan_to_num(1.0)), "negative block scales"),
    "scaled": Row(lambda folder: None, "upload.max_update_norm", limits={"max_update_norm": 1e-9}),
    "other base": Row(
        lambda folder: rewrite(folder, base_revision="0" * 64), "base revision must be"
    ),
    "other tokenizer": Row(
        lambda folder: rewrite(folder, tokenizer_fingerprint="x"), "tokenizer fingerprint must be"
    ),
    "other protocol": Row(lambda folder: rewrite(folder, protocol=99), "protocol must be"),
    "embedding too short": Row(
        embedding_of(bytes([1] * 15) + struct.pack("<f", 1.0)), "must have 20 bytes, got 19"
    ),
    "embedding zero": Row(
        embedding_of(bytes(16) + struct.pack("<f", 1.0)), "embedding must not be all zero"
    ),
    "embedding's scale": Row(
        embedding_of(bytes([1] * 16) + struct.pack("<f", float("inf"))), "finite and positive"
    ),
    "no tokens": Row(lambda folder: rewrite(folder, tokens=0), "tokens must be a positive integer"),
    "path in a name": Row(path_in_a_name, "shard 1 must be named"),
    "symbolic link": Row(link, "must be a regular file"),
    "another's name": Row(
        lambda folder: rewrite(folder, device=HEALTHY), f"device must be '{HOSTILE}'"
    ),
}


def on_disk(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.iterdir() if not path.is_symlink())


@pytest.mark.parametrize("name", ROWS)
def test_row_is_refused_audited_and_weighed(tmp_path: Path, name: str) -> None:
    row = ROWS[name]
    wanted: Expected = expected(row.codec)
    uploads = tmp_path / "uploads"
    for device in (HEALTHY, HOSTILE):
        packed(uploads / device, row.codec, device=device)
    folders = [uploads / HEALTHY, uploads / HOSTILE]

    # the control: the same two uploads, unbroken, under the usual limits
    clean = Audit(tmp_path / "clean.jsonl")
    control = take_in(folders, wanted, Ledger(tmp_path / "clean"), clean, min_devices=2)
    assert [update.device for update in control.updates] == [HEALTHY, HOSTILE]
    assert control.refused == {}

    row.spoil(uploads / HOSTILE)
    ledger, audit = Ledger(tmp_path / "ledger"), Audit(tmp_path / "audit.jsonl")
    # the norm bound of that row would refuse everybody
    judged = folders[1:] if name == "scaled" else folders
    limited = replace(wanted, **row.limits)
    with pytest.raises(TooFewUploads, match="got") as caught:
        take_in(judged, limited, ledger, audit, min_devices=2)
    assert row.reason in str(caught.value)

    lines = [json.loads(line) for line in audit.path.read_text().splitlines()]
    (refusal,) = [line for line in lines if line["verdict"] == "refused"]
    assert refusal["device"] == HOSTILE
    assert row.reason in refusal["reason"]
    manifest = (uploads / HOSTILE / MANIFEST).read_bytes()
    assert refusal["sha256"] == hashlib.sha256(manifest).hexdigest()
    assert verify(audit.path, audit.head) == audit.head
    own = ledger.by_device()
    assert own[HOSTILE].bytes_wasted == own[HOSTILE].bytes_up
    assert own[HOSTILE].bytes_up >= on_disk(uploads / HOSTILE)
    if len(judged) == 2:
        assert own[HEALTHY].bytes_wasted == 0
        assert {line["device"]: line["verdict"] for line in lines}[HEALTHY] == "accepted"
