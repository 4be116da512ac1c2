"""What the report tells of a run's files, without a run."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from deepfusion import report
from deepfusion.messages import device_name
from deepfusion.report_trust import standings_table

SCORE = {"perplexity": 2.0, "accuracy": 0.5}
MODEL = {"kind": "base", "parameters": 10, "domains": {"x": SCORE}}
STANDING = {
    "status": "done",
    "reason": "",
    "node": "7",
    "seconds": 12.34,
    "retries": 0,
    "bytes_up": 1000,
    "bytes_down": 2000,
    "bytes_wasted": 0,
    "shards": "",
    "versions": {},
}
STANDINGS = {
    "device-00": STANDING,
    "device-01": {**STANDING, "status": "late", "reason": "not ready at the deadline"},
    "device-02": {**STANDING, "status": "unavailable", "reason": "never seen", "bytes_up": 0},
    "device-03": {**STANDING, "status": "refused", "reason": "<b>too large</b>"},
}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run, as little of it as the report needs."""
    evaluation = {
        "models": {"base": MODEL, "moe": {**MODEL, "kind": "moe"}},
        "order": ["base", "moe"],
        "split": "test",
        "tokens": 10,
        "not_checked": ["much"],
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    return tmp_path


def test_who_was_late_or_absent_is_on_the_page(run_folder: Path) -> None:
    (run_folder / "collection.json").write_text(json.dumps(STANDINGS))
    page = report.write_report(run_folder).read_text()
    table = (run_folder / "report.md").read_text()
    assert "<h2>Collection</h2>" in page
    for device in map(device_name, range(4)):
        assert device in page
        assert device in table
    assert (
        "| device-01 | late | not ready at the deadline | 12.3 | 0 | 1,000 | 2,000 | 0 |" in table
    )
    assert "| device-02 | unavailable | never seen |" in table
    assert "1 done, 1 late, 1 refused, 1 unavailable" in page
    assert "<b>too large</b>" not in page, "what a run wrote is escaped"


def test_a_run_in_one_process_has_no_collection(run_folder: Path) -> None:
    assert "Collection" not in report.write_report(run_folder).read_text()


def test_standings_are_read_as_the_collection_writes_them() -> None:
    collection = pytest.importorskip("deepfusion.flower.collection")
    written = asdict(collection.Standing("done", seconds=1.0))
    assert written.keys() == STANDING.keys()
    assert standings_table({"device-00": written})[1][1][:4] == ["device-00", "done", "-", "1.0"]
