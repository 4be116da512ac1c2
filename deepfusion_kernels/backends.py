"""Which implementation serves a call: decided once, at the door, and handed on as a plain string.

    asked for by name      that one, or NotImplementedError with its reason
    automatic, on the CPU  cpu, reference
    automatic, on CUDA     triton, cuda (where it has passed its GPU tests), torch, reference

The environment variable DEEPFUSION_BACKEND names a backend for every op that has it and is not
asked otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._triton import HAS_TRITON, INTERPRETED

NAMES = ("reference", "cpu", "cuda", "triton", "torch", "quack")
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "torch", "reference")}
PREFERRED = os.environ.get("DEEPFUSION_BACKEND") or None


def declines(
    name: str, tensor: Tensor, impls: Mapping[str, ModuleType], **facts: Any
) -> str | None:
    """Why backend `name` cannot serve this call, or None.

    An implementation adds its own reasons by `declines(name, tensor, **facts) -> str | None`.
    """
    if name not in impls:
        return f"no such backend of this op; it has {', '.join(impls)}"
    device = tensor.device.type
    reason = None
    if name == "cpu":
        if not _native.BUILD:
            reason = "built without a C++ compiler; install one and build again"
        elif not _native.HAS_CPU:
            built, here = _native.BUILD["cpu_levels"], _native.BUILD["cpu_level_here"]
            reason = f"built for {built}, this processor is {here}; build again here"
        elif device != "cpu":
            reason = f"needs CPU tensors, got {device}"
    elif name == "cuda":
        if not _native.HAS_CUDA:
            reason = "built without nvcc; install the CUDA toolkit and build again"
        elif device != "cuda":
            reason = f"needs CUDA tensors, got {device}"
    elif name == "triton":
        if not HAS_TRITON:
            reason = "needs triton >= 3.6: pip install 'deepfusion-moe[triton]'"
        elif device != "cuda" and not (INTERPRETED and device == "cpu"):
            reason = f"needs CUDA tensors, got {device}"
    own = getattr(impls[name], "declines", None)
    return reason or (own(name, tensor, **facts) if own else None)


def _unproven(name: str, tensor: Tensor, impl: ModuleType) -> str | None:
    """CUDA C++ kernels serve unasked only where they have passed `make gpu`."""
    if name != "cuda":
        return None
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability in getattr(impl, "PROVEN_ON", ()):
        return None
    return (
        f"not yet tested on compute capability {capability[0]}.{capability[1]}; ask for it by name"
    )


def explain(tensor: Tensor, impls: Mapping[str, ModuleType], **facts: Any) -> dict[str, str | None]:
    """Every backend of the automatic order with its reason to decline; the first None is taken."""
    order = ORDER.get(tensor.device.type, ("reference",))
    return {
        name: declines(name, tensor, impls, **facts) or _unproven(name, tensor, impls[name])
        for name in order
        if name in impls
    }


def choose(asked: str | None, tensor: Tensor, impls: Mapping[str, ModuleType], **facts: Any) -> str:
    """The backend that serves this call; `facts` are handed to the implementations' own `declines`.

    Raises ValueError for an unknown name, NotImplementedError for a backend that cannot serve.
    """
    if PREFERRED is not None and PREFERRED not in NAMES:
        raise ValueError(f"DEEPFUSION_BACKEND must be one of {', '.join(NAMES)}, got {PREFERRED!r}")
    if asked is None and PREFERRED in impls:
        asked = PREFERRED
    if asked is not None:
        if asked not in impls and asked not in NAMES:
            raise ValueError(f"backend must be None or one of {', '.join(impls)}, got {asked!r}")
        reason = declines(asked, tensor, impls, **facts)
        if reason is not None:
            raise NotImplementedError(f"{asked}: {reason}; backend=None chooses one that can")
        return asked
    for name in ORDER.get(tensor.device.type, ()):
        if name not in impls or declines(name, tensor, impls, **facts) is not None:
            continue
        if _unproven(name, tensor, impls[name]) is None:
            return name
    return "reference"
