"""What a run says while it works: lines of metrics.jsonl, progress, and what a stage cost.

{"stage": "distill-2", "step": 40, "ce": 4.1, "kl": 0.3}          one line a record
{"stage": "cost.distill-2", "step": 0, "seconds": 61.0, "peak_mib": 812.0}
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from . import files

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 5.0
PEAK_RESET = "5"  # what Linux' clear_refs takes for "forget the peak of the resident memory"
_quiet = False


def silence(quiet: bool) -> None:
    """Show no progress from here on (or show it again); `--quiet` on the command line."""
    global _quiet
    _quiet = quiet


class Recorder:
    """Writes metrics.jsonl; without a path it keeps the lines in memory alone."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._kept: list[dict[str, Any]] = []
        if path is not None:
            files.drop_unfinished_line(path)

    def record(self, stage: str, step: int, **values: float) -> None:
        """Append the values of one step."""
        line = {
            "stage": stage,
            "step": int(step),
            **{name: float(value) for name, value in values.items()},
        }
        if self.path is None:
            self._kept.append(line)
        else:
            files.append_line(self.path, json.dumps(line))

    def lines(self, stage: str | None = None) -> list[dict[str, Any]]:
        """All records, or those of one stage, in the order of writing."""
        every = (
            self._kept if self.path is None else list(map(json.loads, files.whole_lines(self.path)))
        )
        return [line for line in every if stage is None or line["stage"] == stage]

    def restart(self, stage: str, step: int = 0) -> None:
        """Forget a stage's records from `step` on: a stage that resumes writes them anew."""
        kept = [line for line in self.lines() if line["stage"] != stage or line["step"] < step]
        if self.path is None:
            self._kept = kept
        elif self.path.exists():
            files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        if minutes >= 60
        else f"{minutes}:{seconds:02}"
    )


def _line(what: str, done: int, total: int | None, seconds: float) -> str:
    rate = done / seconds if seconds > 0 else math.inf
    of_total = "" if total is None else f"/{total}"
    left = "" if total is None else f", {_duration((total - done) / rate)} left"
    return f"{what}: {done}{of_total} in {_duration(seconds)}, {rate:.3g}/s{left}"


def progress(
    iterable: Iterable[Item], what: str, total: int | None = None, quiet: bool = False
) -> Iterator[Item]:
    """Hand the items on and show how far it is: a bar on a terminal, else a line every 5 s."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if quiet or _quiet:
        yield from iterable
    elif sys.stderr.isatty():
        yield from tqdm(iterable, desc=what, total=total, file=sys.stderr, leave=False)
    else:
        begun = shown = time.monotonic()
        done = 0
        for item in iterable:
            yield item
            done += 1
            now = time.monotonic()
            if now - shown >= SECONDS_BETWEEN_LINES:
                print(_line(what, done, total, now - begun), file=sys.stderr, flush=True)
                shown = now
        if shown > begun:
            print(_line(what, done, total, time.monotonic() - begun), file=sys.stderr, flush=True)


@dataclass
class StageCost:
    """Seconds and peak memory of a stage; zeros until it has ended."""

    seconds: float = 0.0
    peak_mib: float = 0.0
    device_peak_mib: float = 0.0


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text(PEAK_RESET)
    except OSError:
        # NOTE: where the peak cannot be reset, a stage shows the peak of the whole run so far.
        return


def peak_resident_mib() -> float:
    """Largest resident memory of this process since it was last forgotten, MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


@contextmanager
def stage_timer(name: str, recorder: Recorder | None = None) -> Iterator[StageCost]:
    """Measure a stage; its cost is recorded as `cost.<name>`. Timers share one peak: no nesting.

    A stage that was resumed has a line for every part that ended: add seconds, take the largest
    peak.
    """
    cost = StageCost()
    on_cuda = _cuda_in_use()
    _forget_peak()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    yield cost
    cost.seconds = time.monotonic() - begun
    cost.peak_mib = peak_resident_mib()
    if _cuda_in_use():
        cost.device_peak_mib = torch.cuda.max_memory_allocated() / 2**20
    if recorder is not None:
        measured = {"seconds": cost.seconds, "peak_mib": cost.peak_mib}
        if _cuda_in_use():
            measured["device_peak_mib"] = cost.device_peak_mib
        recorder.record(f"cost.{name}", 0, **measured)


def perplexity(nll: float) -> float:
    """exp(nll) of a mean negative log likelihood in nats; infinite where the float overflows."""
    return math.exp(nll) if nll < 709.0 else math.inf
