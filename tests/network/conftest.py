"""Keys and a prepared run folder, once; a federation for every test."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .federation import Federation

REASON = "network: flwr is not installed; pip install 'deepfusion-moe[flower]'"
if importlib.util.find_spec("flwr") is None:

    class Absent(pytest.Module):
        """A file of tests that cannot even be imported."""

        def collect(self) -> Iterator[pytest.Item]:
            pytest.skip(REASON, allow_module_level=True)

    def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
        return Absent.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from deepfusion.flower.keys import make_keys

    from .federation import KEYS

    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder, ("localhost",), KEYS)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with base, starts and tokenizer."""
    from deepfusion import pipeline
    from deepfusion.uploads import Gather

    from .federation import configured

    folder = tmp_path_factory.mktemp("prepared") / "run"

    class Enough(Exception):
        """Base and starts are there."""

    def stop(jobs: object, workers: int) -> list[Path]:
        raise Enough

    gather: Gather = stop
    with pytest.raises(Enough):
        pipeline.run(configured(folder), gather)
    (folder / "config.json").unlink()
    return folder


@pytest.fixture
def federation(tmp_path: Path, keys: Path, prepared: Path) -> Iterator[Callable[..., Federation]]:
    """federation("federation.deadline_seconds=30") -> a Federation, stopped at the end."""
    from .federation import Federation

    made: list[Federation] = []

    def make(*more: str) -> Federation:
        made.append(Federation(tmp_path / f"fed-{len(made)}", keys, prepared, *more))
        return made[-1]

    yield make
    for one in made:
        one.stop()
