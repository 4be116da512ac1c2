"""Loads the native library, if it was built, and says what it holds."""

from __future__ import annotations

from pathlib import Path

import torch

BUILD: dict[str, str] = {}
try:
    from . import _C
except ImportError:
    # built without a C++ compiler: reference and Triton remain
    pass
else:
    torch.ops.load_library(str(Path(__file__).with_name("_ops.so")))  # type: ignore[no-untyped-call]
    BUILD = dict(_C.build_info())

# a build for one processor has nothing for a lesser one
HAS_CPU = BUILD.get("cpu_level_here", "none") in BUILD.get("cpu_levels", "").split(",")
HAS_CUDA = bool(BUILD.get("cuda_archs"))
