"""The gate's table, files and manifest: the broken upload is refused, its healthy twin passes."""

import hashlib
import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepfusion.messages import DeviceUpdate, UploadRefused
from deepfusion.wire import codecs
from deepfusion.wire.audit import Audit, verify
from deepfusion.wire.expected import ArchitectureSpec
from deepfusion.wire.gate import admit, inspect
from deepfusion.wire.package import MANIFEST, read_state

from .uploads import (
    assert_refused,
    edit_shard,
    expected,
    packed,
    reseal,
    rewrite,
    toy_base,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    packed(tmp_path / "up")
    return tmp_path / "up"


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_healthy_upload_passes(tmp_path: Path, codec: str) -> None:
    """The negative control of every test below."""
    manifest = packed(tmp_path / "up", codec)
    update = inspect(tmp_path / "up", expected(codec), "device-00")
    assert isinstance(update, DeviceUpdate)
    assert (update.device, update.architecture, update.tokens) == ("device-00", "toy", 1234)
    assert update.manifest == manifest
    assert update.embedding.norm() == pytest.approx(1.0, abs=1e-6)
    state, base = read_state(tmp_path / "up", manifest, toy_base()), toy_base()
    for name, norm in update.norms.items():
        assert norm == pytest.approx(float((state[name].double() - base[name].double()).norm()))


def test_resealed_upload_passes(folder: Path) -> None:
    """Control of the tools above: rewriting alone is not what gets an upload refused."""
    reseal(folder)
    edit_shard(folder, lambda tensors: None, "scale#q#0")
    inspect(folder, expected(), "device-00")


def test_too_large(folder: Path) -> None:
    (spec,) = expected().architectures.values()
    total = sum(path.stat().st_size for path in folder.iterdir())
    inspect(
        folder,
        replace(expected(), architectures={"toy": replace(spec, max_bytes=total)}),
        "device-00",
    )
    small = {"toy": replace(spec, max_bytes=total - 1)}
    assert_refused(
        folder, f"upload must have at most {total - 1} bytes, got {total}", architectures=small
    )
    both = {"big": replace(spec, max_bytes=1 << 30), **small}
    assert_refused(folder, f"upload of toy must have at most {total - 1} bytes", architectures=both)


def test_nothing_is_parsed_of_an_upload_that_is_too_large(folder: Path) -> None:
    (folder / MANIFEST).write_text("no JSON at all")
    (spec,) = expected().architectures.values()
    assert_refused(folder, "at most 10 bytes", architectures={"toy": replace(spec, max_bytes=10)})
    assert_refused(folder, "manifest: must be JSON")


def test_too_many_shards(folder: Path) -> None:
    assert_refused(folder, "upload must have 1 to 1 shards, got ", shard_bytes=1 << 30)
    assert_refused(folder, "must have at most 1000 bytes, got ", shard_bytes=1000)
    rewrite(folder, shards=[])
    assert_refused(folder, "shards, got 0")


def test_oversized_manifest_and_embedding(folder: Path) -> None:
    embedding = (folder / "embedding.bin").read_bytes()
    (folder / "embedding.bin").write_bytes(embedding + b"x")
    assert_refused(folder, "embedding.bin must have 20 bytes, got 21")
    (folder / "embedding.bin").write_bytes(embedding)
    with (folder / MANIFEST).open("a") as stream:
        stream.write(" " * (1 << 20))
    assert_refused(folder, "manifest.json must have at most 1048576 bytes")


def test_wrong_hash(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_refused(folder, r"shard model-00001-of-\d+.safetensors must have sha256 ")


def test_wrong_length(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes() + b"x")
    assert_refused(folder, r"shard model-00001-of-\d+.safetensors must have \d+ bytes, got \d+")


def test_missing_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()
    assert_refused(folder, "shard model-00002-of-.* is missing")


@pytest.mark.parametrize("missing", [MANIFEST, "embedding.bin"])
def test_missing_file(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    assert_refused(folder, f"file {missing} is missing")


def shards_of(folder: Path) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["shards"]
    return shards


def test_repeated_shard(folder: Path) -> None:
    shards = shards_of(folder)
    rewrite(folder, shards=[shards[0], shards[0], *shards[2:]])
    assert_refused(folder, "shard 2 must be named model-00002")


def test_shards_out_of_order(folder: Path) -> None:
    shards = shards_of(folder)
    rewrite(folder, shards=[shards[1], shards[0], *shards[2:]])
    assert_refused(folder, "shard 1 must be named model-00001")


def test_shard_not_in_the_manifest(folder: Path) -> None:
    (folder / "model-00099-of-00099.safetensors").write_bytes(b"x")
    assert_refused(folder, "shard model-00099-of-00099.safetensors is not in the manifest")


class Bomb:
    """Runs code if anything unpickles it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("name", ["model.pkl", "pytorch_model.bin", "model-00001-of-00002.pt"])
def test_pickle_by_its_suffix(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    assert_refused(folder, f"entry '{name}' must be manifest.json, embedding.bin or a safetensors")


@pytest.mark.parametrize("kind", ["pickle", "zip", "empty"])
def test_pickle_under_a_right_name(
    folder: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = sorted(folder.glob("*.safetensors"))[0]
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "zip":
        torch.save({"a": torch.zeros(3)}, path)
    else:
        path.write_bytes(b"")
    reseal(folder)
    assert_refused(folder, "shard model-00001-of-.* must begin as safetensors do")
    assert not (tmp_path / "unpickled").exists()


def test_right_magic_and_wrong_inside(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(struct.pack("<Q", 9) + b'{"a": 1}]' + b"\0" * 8)
    reseal(folder)
    assert_refused(folder, "shard model-00001-of-.* must be safetensors")


def test_unknown_architecture(folder: Path) -> None:
    rewrite(folder, architecture="gpt-17")
    assert_refused(folder, "architecture must be one of toy, got 'gpt-17'")


def test_architecture_of_a_million_million_parameters() -> None:
    huge = {"w": torch.empty(10**6, 10**6, device="meta")}
    with pytest.raises(ValueError, match=r"upload.max_mib must be >= \d+ .* 1000000000000 param"):
        ArchitectureSpec.of(huge, "delta-int8", "r")
    assert (
        ArchitectureSpec.of({"w": torch.empty(10**6, device="meta")}, "bf16", "r").max_bytes > 2e6
    )


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"base_revision": "0" * 64}, "base revision must be '.*', got '0000"),
        ({"tokenizer_fingerprint": "other"}, "tokenizer fingerprint must be 'fp', got 'other'"),
        ({"protocol": 99}, "protocol must be 1, got '99'"),
        ({"codec": "bf16"}, "codec must be 'delta-int8', got 'bf16'"),
        ({"device": "device-01"}, "device must be 'device-00', got 'device-01'"),
        ({"tokens": 0}, "tokens must be a positive integer, got 0"),
        ({"tokens": -5}, "tokens must be a positive integer, got -5"),
        ({"tokens": True}, "manifest: tokens must be int, got bool"),
        ({"tokens": 1.5}, "manifest: tokens must be int, got float"),
        ({"tokens": "5"}, "manifest: tokens must be int, got str"),
        ({"shards": [{"name": "x"}]}, "manifest: shard: key 'bytes' is missing"),
        ({"ties": {"a": 1}}, r"manifest: ties\['a'\] must be str"),
        ({"surprise": 1}, "manifest: unknown key 'surprise'"),
    ],
)
def test_facts_that_were_not_agreed(folder: Path, change: dict[str, Any], wanted: str) -> None:
    rewrite(folder, **change)
    assert_refused(folder, wanted)


def test_manifest_without_a_key(folder: Path) -> None:
    facts = json.loads((folder / MANIFEST).read_text())
    del facts["tokens"]
    (folder / MANIFEST).write_text(json.dumps(facts))
    assert_refused(folder, "manifest: key 'tokens' is missing")
    (folder / MANIFEST).write_text("[" * 100_000)
    assert_refused(folder, "manifest: must be JSON")


@pytest.mark.parametrize(
    "content, wanted",
    [
        (bytes(16) + struct.pack("<f", 1.0), "embedding must not be all zero"),
        (bytes([1] * 16) + struct.pack("<f", float("nan")), "scale must be finite and positive"),
        (bytes([1] * 16) + struct.pack("<f", float("inf")), "scale must be finite and positive"),
        (bytes([1] * 16) + struct.pack("<f", -1.0), "scale must be finite and positive, got -1.0"),
        (bytes([1] * 16) + struct.pack("<f", 0.0), "scale must be finite and positive"),
        (bytes([1] * 15) + struct.pack("<f", 1.0), "embedding.bin must have 20 bytes, got 19"),
    ],
)
def test_bad_embedding(folder: Path, content: bytes, wanted: str) -> None:
    (folder / "embedding.bin").write_bytes(content)
    reseal(folder)
    assert_refused(folder, wanted)


def test_embedding_hash(folder: Path) -> None:
    (folder / "embedding.bin").write_bytes(bytes([1] * 16) + struct.pack("<f", 1.0))
    assert_refused(folder, "embedding.bin must have sha256")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "model-00001-of-00009.safetensors/../x"])
def test_path_in_a_shard_name(folder: Path, name: str) -> None:
    shards = shards_of(folder)
    rewrite(folder, shards=[{**shards[0], "name": name}, *shards[1:]])
    assert_refused(folder, "shard 1 must be named model-00001-of-")


def test_symbolic_link(folder: Path, tmp_path: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    assert_refused(folder, "must be a regular file, got a link or folder")
    (tmp_path / "link").symlink_to(folder)
    assert_refused(tmp_path / "link", "upload 'link' must be a folder")
    assert_refused(tmp_path / "nowhere", "upload 'nowhere' must be a folder")


def test_folder_or_pipe_instead_of_a_file(folder: Path) -> None:
    (folder / "embedding.bin").unlink()
    os.mkfifo(folder / "embedding.bin")
    assert_refused(folder, "entry 'embedding.bin' must be a regular file")


def test_admit_writes_every_decision(folder: Path, tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    admit(folder, expected(), "device-00", audit, node="n1")
    rewrite(folder, tokens=0)
    with pytest.raises(UploadRefused):
        admit(folder, expected(), "device-00", audit, node="n1")
    first, second = map(json.loads, audit.path.read_text().splitlines())
    assert (first["verdict"], first["reason"]) == ("accepted", "")
    assert second["verdict"] == "refused"
    assert second["reason"].startswith("device-00: tokens must be a positive integer")
    assert second["sha256"] == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    assert second["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    verify(audit.path, audit.head)
