"""What must not grow with the square of the devices, at N = 2000: counts, never seconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.scale import BAD_EVERY, CLUSTERS, messages, one_size, table
from deepfusion import files
from deepfusion.ledger import GROWTH, SMALL_ROWS, Ledger, Transfer
from deepfusion.server import kmeans
from deepfusion.server.kmeans import spherical_kmeans, unit
from deepfusion.wire.audit import Audit, verify
from deepfusion.wire.expected import Expected
from deepfusion.wire.gate import announce
from deepfusion.wire.intake import AT_ONCE, take_in

from .uploads import expected, packed

DEVICES = 2000


def counting(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Path]:
    """The paths that a function of files.py was called with."""
    calls: list[Path] = []
    original: Callable[..., Any] = getattr(files, name)

    def counted(path: Path, *rest: Any, **options: Any) -> Any:
        calls.append(path)
        return original(path, *rest, **options)

    monkeypatch.setattr(files, name, counted)
    return calls


def test_two_thousand_devices_pass_every_small_stage(tmp_path: Path) -> None:
    found = one_size(DEVICES, tmp_path)
    assert found["refused"] == DEVICES // BAD_EVERY
    assert found["accepted"] + found["refused"] == DEVICES
    assert found["rows"] == 3 * DEVICES
    assert found["clusters"] == CLUSTERS
    assert found["adjusted_rand_index"] > 0.5
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert len(lines) == DEVICES
    refused = [line["device"] for line in map(json.loads, lines) if line["verdict"] == "refused"]
    assert refused == ["device-00000999", "device-00001999"]
    assert f"| {DEVICES:,} |" in table([found])


def test_announcement_is_judged_as_the_folder_is(tmp_path: Path) -> None:
    """The cheap half of the gate: same refusals, without a shard; a healthy one passes."""
    packed(tmp_path / "up")
    manifest = (tmp_path / "up" / "manifest.json").read_bytes()
    embedding = (tmp_path / "up" / "embedding.bin").read_bytes()
    wanted: Expected = expected()
    update = announce(manifest, embedding, wanted, "device-00")
    assert (update.device, update.tokens, dict(update.norms)) == ("device-00", 1234, {})
    for said, vector, device, reason in (
        (manifest, embedding, "device-01", "device must be 'device-01'"),
        (manifest, embedding[:-1], "device-00", "embedding must have 16 . 4 bytes, got 19"),
        (manifest, b"\1" * 16 + embedding[16:], "device-00", "embedding.bin must have sha256"),
        (b"{}", embedding, "device-00", "manifest: key"),
        (b" " * (1 << 20) + manifest, embedding, "device-00", "must have at most 1048576 bytes"),
    ):
        with pytest.raises(ValueError, match=reason):
            announce(said, vector, wanted, device)


def test_ledger_is_not_rewritten_for_every_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the disk is not what is counted here
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)
    rewritten = counting(monkeypatch, "whole")
    ledger = Ledger(tmp_path / "ledger")
    for index in range(DEVICES):
        ledger.add(Transfer(f"device-{index:05}", "up", "model", index))
    whole = [path for path in rewritten if path.suffix == ".json"]
    # every message up to SMALL_ROWS, then each time it has grown by a quarter
    assert SMALL_ROWS < len(whole) < SMALL_ROWS + 3 * GROWTH * (DEVICES // SMALL_ROWS).bit_length()
    # a killed run loses nothing: what is not in ledger.json is in the journal
    with ledger.journal.open("a") as stream:
        stream.write('{"torn by a kill')
    again = Ledger(tmp_path / "ledger")
    assert again.transfers == ledger.transfers
    assert len(again.transfers) == DEVICES
    again.compare({})
    assert not again.journal.exists()
    saved = json.loads((tmp_path / "ledger.json").read_text())
    assert saved["totals"]["bytes_wire"] == sum(range(DEVICES))
    assert len(saved["transfers"]) == len(saved["devices"]) == DEVICES
    assert len((tmp_path / "ledger.csv").read_text().splitlines()) == DEVICES + 1


def test_disk_is_waited_for_once_for_many_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 2 * AT_ONCE + 3
    folders = [tmp_path / f"device-{index:04}" for index in range(count)]
    packed(folders[0], device="device-0000")
    appended = counting(monkeypatch, "append_lines")
    audit, ledger = Audit(tmp_path / "audit.jsonl"), Ledger(tmp_path / "ledger")
    intake = take_in(folders, expected(), ledger, audit, min_devices=1)
    assert [update.device for update in intake.updates] == ["device-0000"]
    assert len(intake.refused) == count - 1
    assert len([path for path in appended if path == audit.path]) == 3
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["device"] for line in lines] == [path.name for path in folders]
    assert verify(audit.path, audit.head) == audit.head
    assert len(ledger.by_device()) == count


def test_many_points_choose_restarts_on_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "CHOOSING_POINTS", 300)
    monkeypatch.setattr(kmeans, "CHOOSING_POINTS_PER_CELL", 1)
    draw = torch.Generator().manual_seed(2)
    centres = unit(torch.randn(5, 16, generator=draw).double())
    truth = torch.arange(DEVICES) % 5
    noise = 0.1 * torch.randn(DEVICES, 16, generator=draw).double()
    points = unit(centres[truth] + noise)
    sizes = []
    original = kmeans._plus_plus

    def seeds(some: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(some))
        return original(some, *rest)

    monkeypatch.setattr(kmeans, "_plus_plus", seeds)
    cells, _, objective = spherical_kmeans(points, 5, 4, torch.Generator().manual_seed(1))
    assert sizes == [300] * 4
    pairs = set(zip(cells.tolist(), truth.tolist(), strict=True))
    assert len(pairs) == 5, "every topic is one cell"
    assert objective == pytest.approx(float((points * centres[truth]).sum()), rel=0.01)


def test_messages_are_the_same_every_time() -> None:
    assert messages(3) == messages(4)[:3]
