"""The CUDA kernels on CPU tensors: `make ctest` translates them to C++ (csrc/tests/cuda_on_host).

Every thread of a block is a fiber there, so the kernels' own arithmetic, shuffles, barriers and
launches are run, though not their speed, alignment or memory order.
"""

import ctypes
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import backends

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "build" / "ctest" / "cuda_on_host.so"


def why_not() -> str | None:
    """Why the kernels cannot run here, or None."""
    if not LIBRARY.exists():
        return "CUDA kernels on the host: not built, run `make ctest`"
    written = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    if LIBRARY.stat().st_mtime < written:
        return "CUDA kernels on the host: older than csrc, run `make ctest`"
    return None


@cache
def load() -> ctypes.CDLL:
    torch.ops.load_library(LIBRARY)
    return ctypes.CDLL(str(LIBRARY))


def set_schedule(seed: int) -> None:
    """0: threads run in their order; any other seed is an order of warps and of lanes."""
    load().df_cuda_on_host_schedule(ctypes.c_uint64(seed))


def serve(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """backend="cuda" of these implementations takes CPU tensors from now on."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    load()
    declines = backends.declines

    def on_host(name: str, tensor: Tensor, impls: Any, **facts: Any) -> str | None:
        if name == "cuda" and impls.get(name) in modules:
            own = getattr(impls[name], "declines", None)
            return own(name, tensor, **facts) if own else None
        return declines(name, tensor, impls, **facts)

    monkeypatch.setattr(backends, "declines", on_host)
    monkeypatch.setattr(torch.ops, "deepfusion_native", torch.ops.deepfusion_on_host)
    for module in modules:
        # bound when the module was imported
        monkeypatch.setattr(module, "_ops", torch.ops.deepfusion_on_host, raising=False)
