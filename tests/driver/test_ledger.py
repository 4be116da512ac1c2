"""The ledger weighs what was really written, and names what others would have sent."""

import csv
import json
from pathlib import Path

import pytest

from deepfusion.ledger import Ledger, Transfer, baselines, weigh_upload

from .uploads import packed


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("codec", ["delta-int8", "xor", "bf16"])
def test_bytes_equal_file_sizes(tmp_path: Path, codec: str) -> None:
    ledger = Ledger(tmp_path / "ledger")
    total = 0
    for index in range(3):
        name, folder = f"device-{index:02}", tmp_path / f"up-{index}"
        manifest = packed(folder, codec, device=name)
        ledger.add(*weigh_upload(folder, name, manifest, parameters=4579, bytes_raw=18316))
        assert ledger.totals(name).bytes_up == on_disk(folder)
        total += on_disk(folder)
    assert ledger.totals().bytes_up == ledger.totals().bytes_wire == total
    by_kind = {row.kind: row.bytes_wire for row in ledger.transfers if row.device == "device-00"}
    shards = (tmp_path / "up-0").glob("*.safetensors")
    assert by_kind["model"] == sum(path.stat().st_size for path in shards)
    assert by_kind["embedding"] == (tmp_path / "up-0" / "embedding.bin").stat().st_size
    assert by_kind["manifest"] == (tmp_path / "up-0" / "manifest.json").stat().st_size


def test_both_files_say_the_same(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.add(*weigh_upload(tmp_path / "up", "d", packed(tmp_path / "up")))
    ledger.add(Transfer("d", "down", "encoder", 10), Transfer("c", "down", "encoder", 10))
    ledger.compare({"FedAvg of the MoE, 1 round": 1e9})
    facts = json.loads((tmp_path / "ledger.json").read_text())
    with (tmp_path / "ledger.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["device"] for row in rows] == ["c", "d", "d", "d", "d"]
    assert sum(int(row["bytes_wire"]) for row in rows) == facts["totals"]["bytes_wire"]
    assert facts["totals"]["bytes_down"] == 20
    assert facts["devices"]["c"]["bytes_wire"] == 10
    assert facts["baselines"] == {"FedAvg of the MoE, 1 round": 1e9}


def test_resumed_run_counts_nothing_twice(tmp_path: Path) -> None:
    rows = weigh_upload(tmp_path / "up", "d", packed(tmp_path / "up"))
    Ledger(tmp_path / "ledger.json").add(*rows)
    again = Ledger(tmp_path / "ledger.csv")
    assert again.transfers == tuple(sorted(rows, key=lambda row: row.kind))
    again.add(*rows)
    assert again.totals().bytes_up == on_disk(tmp_path / "up")


def test_refused_upload_was_sent_all_the_same(tmp_path: Path) -> None:
    packed(tmp_path / "up")
    (tmp_path / "up" / "manifest.json").write_text("no JSON")
    (tmp_path / "up" / "junk.pkl").write_bytes(b"x" * 100)
    ledger = Ledger(tmp_path / "ledger")
    ledger.add(*weigh_upload(tmp_path / "up", "d", None, status="refused"))
    assert ledger.totals().bytes_up == ledger.totals().bytes_wasted == on_disk(tmp_path / "up")
    assert {row.status for row in ledger.transfers} == {"refused"}


def test_upload_that_never_came_weighs_nothing(tmp_path: Path) -> None:
    rows = weigh_upload(tmp_path / "nowhere", "d", None, status="refused")
    assert [row.bytes_wire for row in rows] == [0, 0, 0]


def test_impossible_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="direction must be 'up' or 'down', got 'sideways'"):
        Transfer("d", "sideways", "model", 1)
    with pytest.raises(ValueError, match="bytes must be >= 0"):
        Transfer("d", "up", "model", -1)


def test_baselines_are_the_formulas_of_the_design() -> None:
    found = baselines(
        num_devices=8,
        rounds=3,
        moe_bytes=1000,
        partial_share=0.25,
        public_tokens=50,
        kept_logits=4,
        dense_bytes=200,
    )
    assert found == {
        "FedAvg of the MoE, 3 rounds": 2 * 1000 * 3 * 8,
        "partial MoE (FedJETS-like), f = 0.25, 3 rounds": 0.25 * 2 * 1000 * 3 * 8,
        "FedMKT logits, top 4, 3 rounds": 50 * 4 * 6 * 2 * 3 * 8,
        "FedAvg of a dense model, 3 rounds": 2 * 200 * 3 * 8,
    }


def test_unlike_devices_have_no_dense_average() -> None:
    found = baselines(num_devices=8, rounds=1, moe_bytes=9, partial_share=0.5, public_tokens=1)
    assert not any("dense" in name for name in found)
