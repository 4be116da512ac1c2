"""A disk that is really full: one sentence with file and fix, and nothing half-written."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepfusion import cli
from deepfusion.checkpoints import load_state, save_model, save_state
from deepfusion.files import DiskFull
from deepfusion.ledger import Ledger, Transfer
from deepfusion.metrics import Recorder
from deepfusion.wire.audit import Audit, verify
from deepfusion.wire.package import write_package

from .uploads import trained

DISK_BYTES = 64 << 10


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where the machine lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs the command mount")
    if ran.returncode:
        pytest.skip(f"needs the right to mount a small file system: {ran.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as stream:
        try:
            while stream.write(bytes(4096)):
                pass
        except OSError:
            return


def until_full(write: Callable[[], object]) -> None:
    # what was appended before the disk filled has a rest of its last page left
    for _ in range(1000):
        write()


def names(disk: Path) -> list[str]:
    return sorted(path.name for path in disk.rglob("*"))


def test_state_that_does_not_fit(disk: Path) -> None:
    save_state(disk / "x.safetensors", {"a": torch.zeros(100)})
    with pytest.raises(DiskFull, match=r"disk/x.safetensors: no space left .*run.output"):
        save_state(disk / "x.safetensors", {"a": torch.ones(DISK_BYTES)})
    assert names(disk) == ["x.safetensors"]
    assert torch.equal(load_state(disk / "x.safetensors")[0]["a"], torch.zeros(100))


def test_package_that_does_not_fit(disk: Path) -> None:
    base = {"a": torch.zeros(DISK_BYTES * 2)}
    large = replace(trained(), state={"a": torch.ones(DISK_BYTES * 2)}, base=base)
    with pytest.raises(DiskFull, match=r"disk/up: no space left"):
        write_package(large, disk / "up", "delta-int8", 16 << 10)
    assert names(disk) == []
    write_package(trained(), disk / "up", "delta-int8", 16 << 10)


def test_model_that_does_not_fit(disk: Path) -> None:
    class Model:
        def save_pretrained(self, folder: str, /) -> None:
            (Path(folder) / "config.json").write_text("{}")
            (Path(folder) / "weights").write_bytes(bytes(DISK_BYTES * 2))

    with pytest.raises(DiskFull, match="disk/base: no space left"):
        save_model(disk / "base", Model())
    assert names(disk) == []


def test_lines_that_do_not_fit(disk: Path, tmp_path: Path) -> None:
    """An appended line is whole or absent, and the chain of the audit stays whole."""
    recorder, audit = Recorder(disk / "metrics.jsonl"), Audit(disk / "audit.jsonl")
    for index in range(10):
        recorder.record("base", index, loss=1.0)
        audit.append(tmp_path, device="d", node="", verdict="refused", reason="")
    fill(disk)
    with pytest.raises(DiskFull, match=r"metrics.jsonl: no space left"):
        until_full(lambda: recorder.record("base", 10, loss=1.0))
    with pytest.raises(DiskFull, match=r"audit.jsonl: no space left"):
        until_full(lambda: audit.append(tmp_path, device="d", node="", verdict="x", reason=""))
    for path in (recorder.path, audit.path):
        assert path is not None
        assert path.read_bytes().endswith(b"\n")
    assert len(recorder.lines()) >= 10
    assert verify(audit.path, audit.head)


def test_ledger_that_does_not_fit(disk: Path) -> None:
    ledger = Ledger(disk / "ledger")
    ledger.add(Transfer("d", "up", "model", 1))
    before = (disk / "ledger.json").read_text()
    fill(disk)
    with pytest.raises(DiskFull, match=r"ledger.csv: no space left"):
        ledger.add(*(Transfer(f"d{index}", "up", "model", 1) for index in range(200)))
    assert names(disk) == ["ballast", "ledger.csv", "ledger.json"]
    assert (disk / "ledger.json").read_text() == before


def test_command_line_says_one_sentence(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(disk)
    assert cli.main(["init", str(disk / "run.toml")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"deepfusion init: {disk}/run.toml: no space left on the disk")
    assert error.count("\n") == 1
    assert names(disk) == ["ballast"]
