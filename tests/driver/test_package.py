"""A package is whole or absent, the same bytes every time, and read one shard at a time."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepfusion import files
from deepfusion.messages import Manifest, ShardInfo, UploadRefused
from deepfusion.wire import package
from deepfusion.wire.codecs import CODECS
from deepfusion.wire.package import (
    Shards,
    decode_embedding,
    encode_embedding,
    read_state,
    receive_shard,
    shard_name,
    state_revision,
    write_package,
)

from .uploads import DIMENSIONS, SHARD_BYTES, packed, toy_base, trained


@pytest.mark.parametrize("codec", CODECS)
def test_round_trip_through_several_shards(tmp_path: Path, codec: str) -> None:
    manifest = packed(tmp_path / "up", codec)
    assert len(manifest.shards) > 1
    state = read_state(tmp_path / "up", manifest, toy_base())
    sent = trained().state
    assert set(state) == set(sent)
    for name, tensor in sent.items():
        assert state[name].shape == tensor.shape
        assert torch.allclose(state[name].float(), tensor.float(), atol=2e-4, rtol=2**-8)
    assert state["head.weight"] is state["embed.weight"]
    assert torch.equal(state["steps"], sent["steps"])


def test_files_are_those_of_the_manifest(tmp_path: Path) -> None:
    manifest = packed(tmp_path / "up")
    count = len(manifest.shards)
    assert [one.name for one in manifest.shards] == [shard_name(i, count) for i in range(count)]
    present = {path.name for path in (tmp_path / "up").iterdir()}
    assert present == {one.name for one in manifest.shards} | {"manifest.json", "embedding.bin"}
    for one in manifest.shards:
        content = (tmp_path / "up" / one.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (one.bytes, one.sha256)
        assert one.bytes <= SHARD_BYTES
    assert (tmp_path / "up" / "embedding.bin").stat().st_size == DIMENSIONS + 4
    text = (tmp_path / "up" / "manifest.json").read_text()
    assert Manifest.from_json(text) == manifest
    assert manifest.ties == {"head.weight": "embed.weight"}


def test_tied_weights_go_once(tmp_path: Path) -> None:
    tied = packed(tmp_path / "tied")
    untied = dict(trained().state)
    untied["head.weight"] = untied["head.weight"].clone()
    base = toy_base()
    base["head.weight"] = base["head.weight"].clone()
    apart = packed(tmp_path / "apart", state=untied, base=base)
    assert sum(one.bytes for one in apart.shards) > sum(one.bytes for one in tied.shards) + 37 * 11


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        packed(tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("shard_bytes", [512, 1000, 1 << 20])
def test_any_shard_length_gives_the_same_tensors(tmp_path: Path, shard_bytes: int) -> None:
    manifest = write_package(trained(), tmp_path / "up", "delta-int8", shard_bytes)
    reference = packed(tmp_path / "reference")
    assert all(one.bytes <= shard_bytes for one in manifest.shards)
    ours = read_state(tmp_path / "up", manifest, toy_base())
    theirs = read_state(tmp_path / "reference", reference, toy_base())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_impossible_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard_bytes must be >= "):
        write_package(trained(), tmp_path / "up", "delta-int8", 100)
    state = {name: tensor for name, tensor in trained().state.items() if name != "scale"}
    with pytest.raises(ValueError, match="'scale' must be in state and base"):
        packed(tmp_path / "up", state=state)
    with pytest.raises(ValueError, match="embedding: must be finite and not all zero"):
        packed(tmp_path / "up", embedding=torch.zeros(DIMENSIONS))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, written = package.save_file, []

    def second_fails(shard: object, path: Path) -> None:
        written.append(path)
        if len(written) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        genuine(shard, path)

    monkeypatch.setattr(package, "save_file", second_fails)
    with pytest.raises(files.DiskFull, match=r"up: no space left on the disk.*free some space"):
        packed(tmp_path / "up")
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_no_package(tmp_path: Path) -> None:
    body = """
import os, signal, sys
from pathlib import Path
from deepfusion.wire import package
from tests.driver.uploads import packed
genuine = package.save_file
def kill_at_second(shard, path):
    if path.name == "2":
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    genuine(shard, path)
package.save_file = kill_at_second
packed(Path(sys.argv[1]))
"""
    ran = subprocess.run([sys.executable, "-c", body, tmp_path / "up"], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["up.partial"]
    again = packed(tmp_path / "up")
    assert [path.name for path in tmp_path.iterdir()] == ["up"]
    read_state(tmp_path / "up", again, toy_base())


def test_memory_of_the_gate_is_bounded_by_shards(tmp_path: Path) -> None:
    """An upload of ten shards of 4 MiB is checked with less than three of them resident on top."""
    body = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from deepfusion.metrics import stage_timer
from deepfusion.wire import gate
from deepfusion.wire.expected import ArchitectureSpec, Expected
from deepfusion.wire.package import write_package
from tests.driver.uploads import DIMENSIONS, trained

base = {f"w{index:03}": torch.zeros(1 << 17) for index in range(300)}
state = {name: tensor + 1 for name, tensor in base.items()}
spec = ArchitectureSpec.of(base, "delta-int8", "r")
allowed = Expected({"toy": spec}, "fp", "delta-int8", DIMENSIONS, shard_bytes=4 << 20)
one = replace(trained(), state=state, base=base, base_revision="r")
manifest = write_package(one, Path(sys.argv[1]), "delta-int8", 4 << 20)
assert len(manifest.shards) == 10, len(manifest.shards)
del state, one
status = [line.split() for line in open("/proc/self/status")]
before = next(int(line[1]) / 1024 for line in status if line[0] == "VmRSS:")
with stage_timer("gate") as cost:
    gate.inspect(Path(sys.argv[1]), allowed, "device-00")
print(cost.peak_mib - before)
"""
    command = [sys.executable, "-c", body, tmp_path / "up"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 3 * 4


def test_embedding_is_r_plus_4_bytes_and_close() -> None:
    source = torch.Generator().manual_seed(3)
    for _ in range(50):
        sent = torch.randn(64, generator=source)
        content = encode_embedding(sent)
        assert len(content) == 68
        found = decode_embedding(content, 64)
        assert found.norm() == pytest.approx(1.0, abs=1e-6)
        assert torch.dot(found, sent / sent.norm()) > 1 - 1e-3


def test_revision_names_values_types_and_names() -> None:
    base = toy_base()
    assert state_revision(base) == state_revision(toy_base())
    other = dict(base)
    other["layer.weight"] = base["layer.weight"].clone()
    assert state_revision(other) == state_revision(base)
    other["layer.weight"][3, 4] += 1e-6
    assert state_revision(other) != state_revision(base)
    assert state_revision({"a": torch.zeros(2)}) != state_revision({"b": torch.zeros(2)})
    assert state_revision({"a": torch.zeros(2)}) != state_revision({"a": torch.zeros(1, 2)})


CONTENT = bytes(range(256)) * 40
SAID = ShardInfo("../../evil", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def chunks(content: bytes) -> list[bytes]:
    return [content[at : at + 1000] for at in range(0, len(content), 1000)]


def test_shard_is_streamed_to_a_generated_name(tmp_path: Path) -> None:
    path = receive_shard(chunks(CONTENT), tmp_path / "inbox", 0, 2, SAID)
    assert path == tmp_path / "inbox" / "model-00001-of-00002.safetensors"
    assert path.read_bytes() == CONTENT
    assert [one.name for one in tmp_path.iterdir()] == ["inbox"]


@pytest.mark.parametrize(
    "content, wanted",
    [
        (CONTENT + b"x", "must have 10240 bytes, got more"),
        (CONTENT[:-1], "must have 10240 bytes, got 10239"),
        (CONTENT[:-1] + b"x", "must have sha256"),
    ],
)
def test_bad_shard_leaves_nothing(tmp_path: Path, content: bytes, wanted: str) -> None:
    with pytest.raises(UploadRefused, match=wanted):
        receive_shard(chunks(content), tmp_path, 0, 2, SAID)
    assert list(tmp_path.iterdir()) == []


def test_endless_shard_is_cut_off(tmp_path: Path) -> None:
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(1000)

    with pytest.raises(UploadRefused, match="got more"):
        receive_shard(endless(), tmp_path, 0, 1, SAID)  # type: ignore[arg-type]
    assert taken == 11


def test_shard_index_is_strict(tmp_path: Path) -> None:
    count = len(packed(tmp_path / "up").shards)
    assert set(Shards(tmp_path / "up", count).places) == set(toy_base()) - {"head.weight"}
    with pytest.raises(ValueError, match="must be safetensors"):
        Shards(tmp_path / "up", count + 1)
