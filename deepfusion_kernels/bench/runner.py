"""Op x case x backend to rows: time, memory, share of the measured roof, error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..cases import Case
from ..catalog import CATALOG, Op
from . import roofline
from .accuracy import (
    Door,
    error_against,
    outputs_and_gradients,
    rebuilt,
    tensors_in,
    truth_of,
)
from .timing import interleaved, peak_extra_bytes

# what a variant raises that lacks an option, a package or the memory for a call
REFUSALS = (ImportError, NotImplementedError, RuntimeError, ValueError, TypeError, AssertionError)


@dataclass(frozen=True)
class Row:
    """One measured variant of one case."""

    op: str
    case: str
    dtype: str
    variant: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    extra_mib: float
    share_of_roof: float
    error: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """The rows of one case, its inputs' shapes, and who did not serve it and why."""

    rows: list[Row]
    shapes: dict[str, list[int]]
    refused: dict[str, str]


def forward_backward(door: Door, arguments: Mapping[str, Any]) -> Callable[[], list[Tensor]]:
    """A call of the door and of its gradient, with fresh gradients each time."""

    def call() -> list[Tensor]:
        outputs, gradients = outputs_and_gradients(door, arguments, torch.ones_like)
        return gradients or outputs

    return call


def _settled(value: Any) -> Any:
    """Inputs as data: what a case computed from an input that wants a gradient wants none."""
    if isinstance(value, Tensor):
        return value if value.is_leaf else value.detach()
    return rebuilt(value, map(_settled, value)) if isinstance(value, (list, tuple)) else value


def backends_here(op: Op, tensor: Tensor) -> list[str]:
    """The backends that can serve such a tensor on this machine."""
    return [name for name in op.impls if backends.declines(name, tensor, op.impls) is None]


def _serving(
    variants: Mapping[str, tuple[Door, Mapping[str, Any]]], truth: list[Tensor] | None
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The error of every variant that serves, the reason of every other one."""
    errors: dict[str, float | None] = {}
    refused: dict[str, str] = {}
    for name, (door, arguments) in variants.items():
        try:
            outputs, gradients = outputs_and_gradients(door, arguments)
        except REFUSALS as refusal:
            refused[name] = (f"{type(refusal).__name__}: {refusal}").splitlines()[0]
        else:
            errors[name] = error_against(truth, outputs + gradients)
    return errors, refused


def measure(
    stem: str,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    baselines: Mapping[str, Door],
    *,
    repeats: int = 20,
    skip: tuple[str, ...] = (),
) -> Measured:
    """Time our backends and the baselines on one case, interleaved in this process."""
    op = CATALOG[stem]
    arguments = {name: _settled(value) for name, value in case.make(device, dtype, 0).items()}
    sample = next(t for value in arguments.values() for t in tensors_in(value))
    door = op.doors[case.door]
    variants: dict[str, tuple[Door, Mapping[str, Any]]] = {
        name: (door, {**arguments, "backend": name})
        for name in backends_here(op, sample)
        if name not in skip
    }
    variants |= {name: (baseline, arguments) for name, baseline in baselines.items()}
    errors, refused = _serving(variants, truth_of(door, arguments))
    calls = {name: forward_backward(*variants[name]) for name in errors}
    roof = roofline.measure(device, dtype)
    floor_ms = roof.floor_ms(case.bytes_moved(dtype.itemsize), case.flops)
    times = interleaved(calls, device, repeats)
    rows = [
        Row(
            op=case.door,
            case=case.name,
            dtype=str(dtype).removeprefix("torch."),
            variant=name,
            **asdict(times[name]),
            extra_mib=peak_extra_bytes(call, device) / 2**20,
            share_of_roof=floor_ms / times[name].median_ms,
            error=errors[name],
        )
        for name, call in calls.items()
    ]
    shapes = {
        name: list(value.shape) for name, value in arguments.items() if isinstance(value, Tensor)
    }
    return Measured(rows, shapes, refused)
