"""What `serve` and `join` do around Flower's programs, without starting any."""

import json
from pathlib import Path

import pytest

from deepfusion.checkpoints import StageStore
from deepfusion.config import Config, resolve
from deepfusion.device.gather import DeviceJob
from deepfusion.flower import gather as network
from deepfusion.flower import launch
from deepfusion.flower.collection import Standing, write_standings
from deepfusion.flower.control import RunEnd
from deepfusion.flower.joined import Place
from deepfusion.ledger import Ledger
from deepfusion.messages import TooFewUploads, TransportFailed


class Control:
    """Answers as our SuperLink does, from a script; an exception in it is raised."""

    def __init__(self, *script: RunEnd | Exception) -> None:
        self.script = list(script)

    def end_of(self, run: int) -> RunEnd:
        said = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(said, Exception):
            raise said
        return said


RUNNING, OVER = RunEnd("running", ""), RunEnd("finished:completed", "")
SILENT = TransportFailed("no answer")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.01)


def test_every_change_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_standings(tmp_path, {"device-00": Standing("failed", "DiskFull 28")})
    end = launch.watch(Control(RUNNING, RUNNING, OVER), 1, tmp_path, 60)  # type: ignore[arg-type]
    assert end == OVER
    assert capsys.readouterr().out == "device-00: failed DiskFull 28\n"


def test_a_late_answer_is_forgiven_and_a_dead_server_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch.watch(Control(RUNNING, SILENT, OVER), 1, tmp_path, 60) == OVER  # type: ignore[arg-type]
    monkeypatch.setattr(launch, "START_SECONDS", 0.05)
    with pytest.raises(TransportFailed, match="no answer"):
        launch.watch(Control(RUNNING, SILENT), 1, tmp_path, 60)  # type: ignore[arg-type]


def test_a_collection_that_outlives_its_deadline_is_ended(tmp_path: Path) -> None:
    end = launch.watch(Control(RUNNING), 1, tmp_path, 0.05)  # type: ignore[arg-type]
    with pytest.raises(TransportFailed, match="outlived its deadline"):
        launch.check_end(end, tmp_path)


def test_only_completed_is_completed(tmp_path: Path) -> None:
    launch.check_end(OVER, tmp_path)
    for status in ("finished:failed", "finished:stopped", "finished", "running"):
        with pytest.raises(TransportFailed, match=f"ended as {status}: the disk; see"):
            launch.check_end(RunEnd(status, "the disk"), tmp_path)


def test_a_run_folder_has_one_master(tmp_path: Path) -> None:
    with (
        launch.only_one(tmp_path),
        pytest.raises(ValueError, match="another deepfusion process works in this run folder"),
        launch.only_one(tmp_path),
    ):
        pytest.fail("two in one folder")
    with launch.only_one(tmp_path):
        pass


def test_why_a_node_ended(tmp_path: Path) -> None:
    place = Place(device=3, output=str(tmp_path), run_device="cpu", threads=0, data="")
    known = "[code: 2004] Failed to activate SuperNode."
    assert "does not know the key of device-03" in launch._why_it_ended(place, "host:1", known)
    assert launch._why_it_ended(place, "host:1", "anything") == "the connection to host:1 ended"
    with pytest.raises(TransportFailed, match=r"host:1 is not the server of these keys"):
        launch._why_it_ended(place, "host:1", "[SSL: CERTIFICATE_VERIFY_FAILED] certificate")


@pytest.fixture
def jobs(tmp_path: Path) -> list[DeviceJob]:
    config: Config = resolve({"federation": {"min_devices": 2, "num_devices": 4}})
    (tmp_path / "start").write_bytes(b"start")
    (tmp_path / "tokenizer").mkdir()
    return [
        DeviceJob(f"device-0{i}", "gpt2", [], tmp_path / "start", tmp_path / "tokenizer", config,
                  tmp_path / "run")
        for i in range(3)
    ]  # fmt: skip


def collecting(came: list[str], refused: str = "") -> tuple[list[list[str]], object]:
    """A collection in which some come; and a list of whom each collection asked."""
    asked: list[list[str]] = []

    def collect(config: Config, folder: Path, jobs: list[DeviceJob]) -> None:
        asked.append([job.device for job in jobs])
        standings = {}
        for job in jobs:
            if job.device in came:
                job.upload.mkdir(parents=True)
                (job.upload / "manifest.json").write_text("{}")
                standings[job.device] = Standing("done", node="7", bytes_down=10, seconds=3.0)
            elif job.device == refused:
                standings[job.device] = Standing("refused", "too large", node="8", bytes_up=5)
            else:
                standings[job.device] = Standing("late", "not ready at the deadline")
        write_standings(folder, standings)

    return asked, collect


def test_too_few_names_everybody_missing_and_the_next_run_asks_them_alone(
    jobs: list[DeviceJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, collect = collecting(["device-01"], refused="device-02")
    monkeypatch.setattr(network, "_collect", collect)
    with pytest.raises(TooFewUploads) as caught:
        network.gather(jobs)
    told = str(caught.value)
    assert "got 1 of 3" in told
    assert "device-00: late not ready at the deadline" in told
    assert "device-02: refused too large" in told
    folder = jobs[0].run_folder
    rows = {(row.device, row.kind): row for row in Ledger(folder / "ledger").transfers}
    assert (rows["device-01", "base"].bytes_wire, rows["device-01", "base"].node) == (10, "7")
    assert rows["device-02", "wasted"].bytes_wasted == 5
    (line,) = (folder / "audit.jsonl").read_text().splitlines()
    assert json.loads(line)["verdict"] == "refused"

    again, collect = collecting(["device-00", "device-02"])
    monkeypatch.setattr(network, "_collect", collect)
    assert [one.name for one in network.gather(jobs)] == ["device-00", "device-01", "device-02"]
    assert asked == [["device-00", "device-01", "device-02"]]
    assert again == [["device-00", "device-02"]]
    network.gather(jobs)
    assert len(again) == 1, "nobody is asked twice"


def test_after_the_gate_a_late_device_stays_away(
    jobs: list[DeviceJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, collect = collecting(["device-00", "device-01"])
    monkeypatch.setattr(network, "_collect", collect)
    assert len(network.gather(jobs)) == 2
    # killed before the gate: the late one may still come
    assert len(network.gather(jobs)) == 2
    assert len(asked) == 2
    StageStore(jobs[0].run_folder).mark_done("gate", "", [])
    assert len(network.gather(jobs)) == 2
    assert len(asked) == 2
