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
from typing import Any, Literal

import torch

from . import files
from .checkpoints import StageStore
from .config import Config
from .metrics import Recorder, stage_timer
from .ranks import ALONE, Alone
from .step_checkpoint import StepCheckpoint

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
Facts = Mapping[str, Any]


@dataclass
class Run:
    """A run folder that belongs to one configuration.

    Of several processes that share it the first does every stage that is not said to be another's,
    and the others wait; what another one records goes to ranks/<rank>.jsonl.
    """

    config: Config
    folder: Path
    ranks: Alone = ALONE
    store: StageStore = field(init=False)
    recorder: Recorder = field(init=False)

    def __post_init__(self) -> None:
        self.store = StageStore(self.folder)
        self.recorder = Recorder(self.folder / "metrics.jsonl" if self.ranks.first else self._own)
        if self.ranks.first:
            self.store.claim(self.config.to_toml(), self.config.hash())
            files.write_json(self.folder / "facts.json", self._facts())
        self.ranks.wait()

    def stage(
        self,
        name: str,
        after: Sequence[str],
        outputs: Sequence[str],
        work: Callable[[], Facts | None],
        *,
        reads: Sequence[str],
        by: Literal["first", "all"] | int = "first",
    ) -> None:
        """Do a stage's work, unless it was done on the same inputs and its outputs are whole.

        reads: the tables of the configuration that the stage depends on, beside seed and device.
        by: the first process while the others wait; all of them together, of whom the first writes;
        or one by its number (modulo theirs), for whom nobody waits before `meet`.
        """
        run = self.config.run
        own = f"{self.config.hash(*reads)} {run.seed} {run.device} {run.kernels}"
        inputs = sha256("".join([own, *map(self.store.outputs_hash, after)]).encode()).hexdigest()
        done = self.store.done(name, inputs)
        shared = isinstance(by, str)
        if shared:
            # nobody may write before everybody has looked
            self.ranks.wait()
        writes = self.ranks.first if shared else by % self.ranks.size == self.ranks.rank
        if writes and done:
            print(f"{name}: done before", flush=True)
        elif writes:
            self._do(name, inputs, outputs, work)
        elif by == "all" and not done:
            work()
        if shared:
            self.ranks.wait()

    def _do(
        self, name: str, inputs: str, outputs: Sequence[str], work: Callable[[], Facts | None]
    ) -> None:
        print(f"{name} ...", flush=True)
        with stage_timer(name, self.recorder) as cost:
            facts = work()
        self.store.mark_done(name, inputs, [self.folder / one for one in outputs], facts)
        print(f"{name}: {cost.seconds:.1f} s, peak {cost.peak_mib:.0f} MiB", flush=True)

    def meet(self, stages: Sequence[str]) -> None:
        """Wait for every process; the first takes over what the others recorded of `stages`."""
        self.ranks.wait()
        if self.ranks.first and self.ranks.size > 1:
            for own in sorted((self.folder / "ranks").glob("*.jsonl")):
                for stage in stages:
                    self._take_over(Recorder(own), stage)
        self.ranks.wait()

    def _take_over(self, other: Recorder, stage: str) -> None:
        for name in (stage, f"{stage}.views", f"cost.{stage}"):
            lines = other.lines(name)
            if lines:
                self.recorder.restart(name)
            for line in lines:
                values = {key: line[key] for key in line if key not in ("stage", "step")}
                self.recorder.record(name, line["step"], **values)

    @property
    def _own(self) -> Path:
        return self.folder / "ranks" / f"{self.ranks.rank}.jsonl"

    def checkpoint(self, name: str, every: int, together: bool = False) -> StepCheckpoint:
        """Where a long stage keeps its state between steps; `together`: of all processes."""
        path = self.folder / "steps" / f"{name}.safetensors"
        return StepCheckpoint(path, every, self.ranks if together else ALONE)

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
