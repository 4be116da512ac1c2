"""Every op of the catalog through its doors: opcheck; full-graph compilation with gradients."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepfusion_kernels.cases import Case
from deepfusion_kernels.catalog import CATALOG, Op

QUICK = [
    pytest.param(op, case, id=f"{case.door}-{case.name}")
    for op in CATALOG.values()
    for case in op.cases
    if case.quick
]
# one small compilation a door: its first quick case
FIRST = list({param.values[1].door: param for param in reversed(QUICK)}.values())[::-1]


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every deepfusion:: op that is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "deepfusion":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def run_forward(door: Any, arguments: dict[str, Any]) -> list[Tensor]:
    return list(tensors(door(**arguments)))


def run_backward(outputs: list[Tensor], arguments: dict[str, Any]) -> list[Tensor]:
    """The gradients of everything that wants one, under ones; none where nothing does."""
    wanted = [t for value in arguments.values() for t in tensors(value) if t.requires_grad]
    roots = [output for output in outputs if output.requires_grad]
    if not roots:
        return []
    ones = [torch.ones_like(root) for root in roots]
    gradients = torch.autograd.grad(roots, wanted, ones, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


def fresh(value: Any, wants_gradient: bool) -> Any:
    """The same argument as a leaf: opcheck differentiates by itself."""
    if isinstance(value, Tensor):
        wants = wants_gradient and value.requires_grad
        return value.detach().clone().requires_grad_(wants)
    if isinstance(value, (list, tuple)):
        return type(value)(fresh(item, wants_gradient) for item in value)
    return value


@pytest.mark.parametrize(("op", "case"), QUICK)
def test_opcheck(op: Op, case: Case) -> None:
    """Schema, autograd registration, fake kernels and tracing of forward and backward ops."""
    arguments = case.make(torch.device("cpu"), torch.float32, 0)
    with Recorder() as forward:
        outputs = run_forward(op.doors[case.door], arguments)
    with Recorder() as backward:
        run_backward(outputs, arguments)
    assert forward.calls, f"{case.door} dispatched no deepfusion:: op"
    for function, args, kwargs in forward.calls:
        torch.library.opcheck(function, tuple(fresh(arg, True) for arg in args), kwargs)
    # a backward op has no gradient of its own
    for function, args, kwargs in backward.calls:
        torch.library.opcheck(function, tuple(fresh(arg, False) for arg in args), kwargs)


@pytest.mark.parametrize(("op", "case"), FIRST)
def test_full_graph_compilation(op: Op, case: Case) -> None:
    check_compiled(op, case, "aot_eager", dynamic=None)


@pytest.mark.parametrize(("op", "case"), FIRST[:1])
def test_full_graph_compilation_by_inductor_with_dynamic_shapes(op: Op, case: Case) -> None:
    check_compiled(op, case, "inductor", dynamic=True)


def check_compiled(op: Op, case: Case, backend: str, dynamic: bool | None) -> None:
    """The compiled door gives what the door gives, gradients included."""
    arguments = case.make(torch.device("cpu"), torch.float32, 0)
    door = op.doors[case.door]
    torch._dynamo.reset()
    compiled = torch.compile(door, fullgraph=True, backend=backend, dynamic=dynamic)
    ours, wanted = run_forward(compiled, arguments), run_forward(door, arguments)
    ours += run_backward(ours, arguments)
    wanted += run_backward(wanted, arguments)
    assert len(ours) == len(wanted)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other)
