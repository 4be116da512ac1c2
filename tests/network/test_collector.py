"""The server's loop over a grid with scripted nodes: deadlines, its end, answers that are none."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepfusion.flower import records, server_app
from deepfusion.flower.server_app import Collector
from deepfusion.flower.talk import Ask
from tests.driver.uploads import packed
from tests.network.scripted import NODE, Device, wanted


@pytest.fixture
def package(tmp_path: Path) -> Path:
    packed(tmp_path / "package")
    return tmp_path / "package"


class Grid:
    """Flower's grid with one scripted node; `online` says whether it is there at a poll."""

    def __init__(self, device: Device, online: Iterator[bool]) -> None:
        self.device = device
        self.online = online
        self.replies: dict[str, Any] = {}

    def get_node_ids(self) -> list[int]:
        return [NODE] if next(self.online) else []

    def push_messages(self, messages: list[Any]) -> list[str]:
        (message,) = messages
        content, node, kind = message
        assert node == NODE
        ask = Ask(kind, records.facts_of(content), records.pieces_of(content))
        name = str(len(self.replies))
        self.replies[name] = self.device.answer(ask)
        return [name]

    def pull_messages(self, names: list[str]) -> list[Any]:
        return [self.replies[name] for name in names]


def always() -> Iterator[bool]:
    while True:
        yield True


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepfusion.flower.server_app.POLL_SECONDS", 0.01)
    monkeypatch.setattr("deepfusion.flower.server_app.Message", lambda *given, ttl: given)


def test_the_deadline_names_who_was_never_seen(tmp_path: Path, package: Path) -> None:
    def never() -> Iterator[bool]:
        while True:
            yield False

    collector = Collector(Grid(Device(package), never()), wanted(tmp_path, deadline=0.2))  # type: ignore[arg-type]
    collector.run()
    found = json.loads((tmp_path / "run" / "collection.json").read_text())["device-00"]
    assert (found["status"], found["reason"]) == ("unavailable", "never seen")


def test_the_loop_ends_when_all_are_done(tmp_path: Path, package: Path) -> None:
    def later() -> Iterator[bool]:
        yield False
        while True:
            yield True

    collector = Collector(Grid(Device(package), later()), wanted(tmp_path))  # type: ignore[arg-type]
    collector.run()
    assert collector.left() > 0
    assert collector.standings["device-00"].status == "done"
    assert collector.standings["device-00"].node == str(NODE)


class Unreadable(Grid):
    """The first answer is none that Flower could put together."""

    def __init__(self, device: Device, fault: Exception) -> None:
        super().__init__(device, always())
        self.fault = [fault]

    def pull_messages(self, names: list[str]) -> list[Any]:
        if self.fault:
            raise self.fault.pop()
        return super().pull_messages(names)


@pytest.mark.parametrize("fault", [KeyError("x"), ValueError("patient Jane Doe"), RecursionError()])
def test_an_answer_that_cannot_be_read_ends_one_conversation(
    tmp_path: Path, package: Path, fault: Exception
) -> None:
    """It must not end the collection, and its words must not be kept."""
    device = Device(package)
    collector = Collector(Unreadable(device, fault), wanted(tmp_path))  # type: ignore[arg-type]
    collector.run()
    standing = collector.standings["device-00"]
    name = type(fault).__name__
    assert (standing.status, standing.reason) == (
        "refused",
        f"its answer cannot be read: {name}",
    )
    assert device.verdict == f"refused: {standing.reason}"


def test_a_fault_of_our_own_ends_the_collection(tmp_path: Path, package: Path) -> None:
    fault = OSError(28, "No space left on device")
    collector = Collector(Unreadable(Device(package), fault), wanted(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No space left"):
        collector.run()


class Dripping:
    """Two nodes; the first one's answers never end."""

    def __init__(self, devices: dict[int, Device]) -> None:
        self.grids = {node: Grid(device, always()) for node, device in devices.items()}
        self.ended = threading.Event()

    def get_node_ids(self) -> list[int]:
        return list(self.grids)

    def push_messages(self, messages: list[Any]) -> list[str]:
        ((content, node, kind),) = messages
        (name,) = self.grids[node].push_messages([(content, NODE, kind)])
        return [f"{node} {name}"]

    def pull_messages(self, names: list[str]) -> list[Any]:
        node, _, name = names[0].partition(" ")
        if int(node) == NODE:
            self.ended.wait(30)
            return []
        return self.grids[int(node)].pull_messages([name])


def two(what: Any) -> Any:
    first = what.devices[0]
    return replace(what, devices=(first, replace(first, device="device-01", node=NODE + 1)))


class Second(Device):
    """The same package under another name."""

    def hello(self, facts: dict[str, Any]) -> Any:
        said = {"protocol": 1, "device": "device-01", "held": [], "begun": {}, "versions": {}}
        return records.pack(said)

    def train(self, facts: dict[str, Any]) -> Any:
        said = json.loads((self.package / "manifest.json").read_text())
        text = json.dumps({**said, "device": "device-01"})
        return records.pack({"manifest": text}, [(self.package / "embedding.bin").read_bytes()])


def test_an_answer_that_comes_by_drops_keeps_nobody_waiting(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_app, "PULL_PATIENCE", 0.01)
    monkeypatch.setattr(server_app, "PULL_SECONDS", 0.3)
    grid = Dripping({NODE: Device(package), NODE + 1: Second(package)})
    collector = Collector(grid, two(wanted(tmp_path, deadline=2.0)))  # type: ignore[arg-type]
    collector.run()
    grid.ended.set()
    first, second = (collector.standings[f"device-0{index}"] for index in range(2))
    assert second.status == "done"
    assert first.status in ("waiting", "unavailable")
    assert first.retries > 0, "given up, and asked again"
