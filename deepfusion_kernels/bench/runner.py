"""Op x case x backend to rows: time, memory, share of the measured roof."""

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
from .timing import interleaved, peak_extra_bytes

Door = Callable[..., Any]


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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def forward_backward(door: Door, arguments: Mapping[str, Any]) -> Callable[[], list[Tensor]]:
    """A call of the door and of its gradient, with fresh gradients each time."""
    wanted = [t for value in arguments.values() for t in _tensors(value) if t.requires_grad]

    def call() -> list[Tensor]:
        outputs = [
            t for t in _tensors(door(**arguments)) if t.requires_grad and t.is_floating_point()
        ]
        if not (wanted and outputs):
            return outputs
        ones = [torch.ones_like(output) for output in outputs]
        gradients = torch.autograd.grad(outputs, wanted, ones, allow_unused=True)
        return [gradient for gradient in gradients if gradient is not None]

    return call


def backends_here(op: Op, tensor: Tensor) -> list[str]:
    """The backends that can serve such a tensor on this machine."""
    return [name for name in op.impls if backends.declines(name, tensor, op.impls) is None]


def measure(
    stem: str,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    baselines: Mapping[str, Door],
    *,
    repeats: int = 20,
    skip: tuple[str, ...] = (),
) -> list[Row]:
    """Time our backends and the baselines on one case, interleaved in this process."""
    op = CATALOG[stem]
    arguments = case.make(device, dtype, 0)
    sample = next(t for value in arguments.values() for t in _tensors(value))
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    for name in backends_here(op, sample):
        if name not in skip:
            calls[name] = forward_backward(op.doors[case.door], {**arguments, "backend": name})
    for name, baseline in baselines.items():
        calls[name] = forward_backward(baseline, arguments)
    roof = roofline.measure(device, dtype)
    floor_ms = roof.floor_ms(case.bytes_moved(dtype.itemsize), case.flops)
    times = interleaved(calls, device, repeats)
    return [
        Row(
            op=case.door,
            case=case.name,
            dtype=str(dtype).removeprefix("torch."),
            variant=name,
            **asdict(times[name]),
            extra_mib=peak_extra_bytes(call, device) / 2**20,
            share_of_roof=floor_ms / times[name].median_ms,
        )
        for name, call in calls.items()
    ]
