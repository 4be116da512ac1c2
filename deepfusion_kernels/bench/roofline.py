"""What this device reaches: bytes per second of a large copy, flops of a large matrix product.

Shares of peak are shares of these measured ceilings, never of a data sheet.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from .timing import interleaved


@dataclass(frozen=True)
class Roof:
    """Measured ceilings of one device."""

    bytes_per_second: float
    flops_per_second: float

    def floor_ms(self, bytes_moved: int, flops: int) -> float:
        """No version runs faster than the larger of the two times."""
        return 1e3 * max(bytes_moved / self.bytes_per_second, flops / self.flops_per_second)


@functools.cache
def measure(device: torch.device, dtype: torch.dtype) -> Roof:
    """Measure both ceilings once a process: a copy out of cache, a square matrix product."""
    on_gpu = device.type == "cuda"
    elements = (2**30 if on_gpu else 2**26) // dtype.itemsize
    side = 8192 if on_gpu else 2048
    source, target = (torch.ones(elements, device=device, dtype=dtype) for _ in range(2))
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = interleaved(
        {"copy": lambda: target.copy_(source), "product": lambda: left @ right}, device, repeats=7
    )
    return Roof(
        bytes_per_second=2e3 * elements * dtype.itemsize / times["copy"].median_ms,
        flops_per_second=2e3 * side**3 / times["product"].median_ms,
    )


def device_name(device: torch.device) -> str:
    """A name that can be a folder: the GPU's, or the processor's with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1] for line in _lines(info) if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join(["cpu", *words[:4], f"{torch.get_num_threads()}-threads"])


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
