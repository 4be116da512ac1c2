"""Times variants against each other in one process, interleaved, caches cold; peak memory too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from . import native_impl

Variant = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one variant: median and the 20th and 80th percentile."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    variants: Mapping[str, Variant],
    device: torch.device,
    repeats: int = 20,
    warmup: int = 3,
    flush_mib: int = 64,
) -> dict[str, Timing]:
    """Time every variant `repeats` times, one call of each in turn, the caches overwritten between.

    Turns keep drift of the machine (clocks, neighbours) from favouring one side.
    """
    for variant in variants.values():
        for _ in range(warmup):
            variant()
    flush = torch.empty(flush_mib * 2**18, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            flush.fill_(1.0)
            _synchronise(device)
            start = time.perf_counter()
            variant()
            _synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: _summary(times) for name, times in seconds.items()}


def _summary(times: list[float]) -> Timing:
    ordered = sorted(times)
    last = len(ordered) - 1
    return Timing(
        median_ms=1e3 * statistics.median(ordered),
        p20_ms=1e3 * ordered[round(0.2 * last)],
        p80_ms=1e3 * ordered[round(0.8 * last)],
        repeats=len(ordered),
    )


def peak_extra_bytes(variant: Variant, device: torch.device) -> int:
    """The most memory alive at once during a call beyond what was alive before it.

    On CUDA the allocator's own peak. On the CPU the largest running sum of what torch's allocator
    reports, plus the most that our kernels held beside it (kept blocks in use, scratch): at most
    too much, since the two need not be at their largest together.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        variant()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    before, _ = native_impl.held_bytes(restart=True)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = variant()
    held = native_impl.held_bytes()[1] - before
    del kept
    assert profile.profiler is not None, "the profiler has ended"
    results = profile.profiler.kineto_results
    assert results is not None, "the profiler has recorded"
    events = [e for e in results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak + held
