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
    "orthogonalise",
)


@dataclass(frozen=True)
class Op:
    """One stem: its public functions by name, its implementations by backend, its cases."""

    stem: str
    doors: Mapping[str, Callable[..., Any]]
    impls: Mapping[str, ModuleType]
    reference: ModuleType
    cases: tuple[Case, ...]


# doors that join several ops live in nn: stem they are listed under -> (module, its cases)
JOINED = {"view_aligned_attention": ("nn.view_alignment", "nn.alignment_cases")}


def _row(stem: str) -> Op:
    op = import_module(f".ops.{stem}.op", __package__)
    cases = import_module(f".ops.{stem}.cases", __package__)
    doors, shapes = {name: getattr(op, name) for name in op.DOORS}, cases.CASES
    if stem in JOINED:
        module, joined = (import_module(f".{name}", __package__) for name in JOINED[stem])
        doors |= {joined.DOOR: getattr(module, joined.DOOR)}
        shapes = (*shapes, *joined.CASES)
    return Op(stem, doors, op.IMPLS, op.IMPLS["reference"], shapes)


CATALOG: dict[str, Op] = {stem: _row(stem) for stem in STEMS}
