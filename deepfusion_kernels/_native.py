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

HAS_CPU = bool(BUILD)
HAS_CUDA = bool(BUILD.get("cuda_archs"))
