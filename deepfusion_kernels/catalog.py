"""The list of ops, once: doors, implementations, reference, cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from .cases import Case

STEMS: tuple[str, ...] = (
    # one a line, in the order of docs/floors.md
    "kl_distillation",
    "fused_linear_kl",
    "topk_kl",
    "moe_routing",
    "moe_dispatch",
    "moe_experts",
    "view_aligned_attention",
    "fused_linear_mse",
)


@dataclass(frozen=True)
class Op:
    """One stem: its public functions by name, its implementations by backend, its cases."""

    stem: str
    doors: Mapping[str, Callable[..., Any]]
    impls: Mapping[str, ModuleType]
    reference: ModuleType
    cases: tuple[Case, ...]


def _row(stem: str) -> Op:
    op = import_module(f".ops.{stem}.op", __package__)
    cases = import_module(f".ops.{stem}.cases", __package__)
    doors = {name: getattr(op, name) for name in op.DOORS}
    return Op(stem, doors, op.IMPLS, op.IMPLS["reference"], cases.CASES)


CATALOG: dict[str, Op] = {stem: _row(stem) for stem in STEMS}
