"""metrics.jsonl, progress without a terminal, and the cost of a stage."""

import json
import math
from pathlib import Path

import pytest
import torch

from deepfusion import metrics
from deepfusion.metrics import Recorder, perplexity, progress, stage_timer


@pytest.mark.parametrize("on_disk", [True, False])
def test_restart_forgets_one_stage_from_a_step(tmp_path: Path, on_disk: bool) -> None:
    recorder = Recorder(tmp_path / "metrics.jsonl" if on_disk else None)
    for step in range(3):
        recorder.record("base", step, loss=step)
        recorder.record("tune", step, loss=step)
    recorder.restart("tune", 1)
    assert [line["step"] for line in recorder.lines("tune")] == [0]
    assert len(recorder.lines("base")) == 3
    recorder.restart("base")
    assert recorder.lines() == [{"stage": "tune", "step": 0, "loss": 0.0}]


def test_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Recorder(path).record("base", 1, loss=2.5)
    with path.open("a") as stream:
        stream.write('{"stage": "ba')
    recorder = Recorder(path)
    recorder.record("base", 2, loss=math.inf)
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [2.5, math.inf]


def test_progress_hands_on_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(5), "devices", quiet=True)) == list(range(5))
    assert capsys.readouterr() == ("", "")


def test_progress_writes_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(progress(iter("abcd"), "devices", total=4)) == list("abcd")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("devices: 1/4 in 0:00, ")
    assert lines[-1].startswith("devices: 4/4")
    assert all(line.endswith(" left") for line in lines)


def test_progress_is_seldom(capsys: pytest.CaptureFixture[str]) -> None:
    list(progress(range(1000), "devices"))
    assert capsys.readouterr().err == ""


def test_silence_reaches_every_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_LINES", 0.0)
    metrics.silence(True)
    try:
        list(progress(range(3), "devices"))
    finally:
        metrics.silence(False)
    assert capsys.readouterr().err == ""


def test_stage_timer_sees_the_memory_of_its_stage() -> None:
    recorder = Recorder(None)
    before = metrics.peak_resident_mib()
    with stage_timer("large", recorder) as large:
        block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    assert large.peak_mib >= 64
    assert large.seconds > 0
    assert large.peak_mib < before + 200
    (line,) = recorder.lines("cost.large")
    assert line["peak_mib"] == large.peak_mib


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(50.0)) == pytest.approx(50.0)
    assert perplexity(1e4) == math.inf
