"""The server's loop over a grid with one scripted node: deadlines, and its end."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepfusion.flower import records
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


def test_the_deadline_names_who_was_never_seen(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepfusion.flower.server_app.POLL_SECONDS", 0.01)
    monkeypatch.setattr("deepfusion.flower.server_app.Message", lambda *given, ttl: given)

    def never() -> Iterator[bool]:
        while True:
            yield False

    collector = Collector(Grid(Device(package), never()), wanted(tmp_path, deadline=0.2))  # type: ignore[arg-type]
    collector.run()
    found = json.loads((tmp_path / "run" / "collection.json").read_text())["device-00"]
    assert (found["status"], found["reason"]) == ("unavailable", "never seen")


def test_the_loop_ends_when_all_are_done(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepfusion.flower.server_app.POLL_SECONDS", 0.01)
    monkeypatch.setattr("deepfusion.flower.server_app.Message", lambda *given, ttl: given)

    def later() -> Iterator[bool]:
        yield False
        while True:
            yield True

    collector = Collector(Grid(Device(package), later()), wanted(tmp_path))  # type: ignore[arg-type]
    collector.run()
    assert collector.left() > 0
    assert collector.standings["device-00"].status == "done"
    assert collector.standings["device-00"].node == str(NODE)
