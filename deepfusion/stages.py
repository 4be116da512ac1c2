"""One run folder while stages are run in it: who is done, what a stage reads, what it cost.

inputs of a stage = its tables of the configuration and the outputs of the stages before it
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import files
from .checkpoints import StageStore, StepCheckpoint
from .config import Config
from .metrics import Recorder, stage_timer

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
Facts = Mapping[str, Any]


@dataclass
class Run:
    """A run folder that belongs to one configuration."""

    config: Config
    folder: Path
    store: StageStore = field(init=False)
    recorder: Recorder = field(init=False)

    def __post_init__(self) -> None:
        self.store = StageStore(self.folder)
        self.store.claim(self.config.to_toml(), self.config.hash())
        self.recorder = Recorder(self.folder / "metrics.jsonl")
        files.write_json(self.folder / "facts.json", self._facts())

    def stage(
        self,
        name: str,
        after: Sequence[str],
        outputs: Sequence[str],
        work: Callable[[], Facts | None],
        *,
        reads: Sequence[str],
    ) -> None:
        """Do a stage's work, unless it was done on the same inputs and its outputs are whole.

        reads: the tables of the configuration that the stage depends on, beside seed and device.
        """
        run = self.config.run
        own = f"{self.config.hash(*reads)} {run.seed} {run.device} {run.kernels}"
        inputs = sha256("".join([own, *map(self.store.outputs_hash, after)]).encode()).hexdigest()
        if self.store.done(name, inputs):
            print(f"{name}: done before", flush=True)
            return
        print(f"{name} ...", flush=True)
        with stage_timer(name, self.recorder) as cost:
            facts = work()
        self.store.mark_done(name, inputs, [self.folder / one for one in outputs], facts)
        print(f"{name}: {cost.seconds:.1f} s, peak {cost.peak_mib:.0f} MiB", flush=True)

    def checkpoint(self, name: str, every: int) -> StepCheckpoint:
        """Where a long stage keeps its state between steps."""
        return StepCheckpoint(self.folder / "steps" / f"{name}.safetensors", every)

    def write(self, name: str, facts: Any) -> None:
        """A JSON file of the run folder, whole or not at all."""
        files.write_json(self.folder / name, facts)

    def read(self, name: str) -> Any:
        """A JSON file of the run folder."""
        return json.loads((self.folder / name).read_text())

    def _facts(self) -> dict[str, Any]:
        config = self.config
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
        return {
            "recipe": config.run.recipe,
            "kernels": config.run.kernels,
            "seed": config.run.seed,
            "text": config.data.source,
            "configuration": config.hash()[:16],
            "commit": commit.stdout.strip() or "unknown",
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            **{name: version(name) for name in PACKAGES},
        }
