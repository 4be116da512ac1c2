"""The router as an op: what it saves, bits, strides, registration, compilation, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import moe_route
from deepfusion_kernels.catalog import CATALOG
from deepfusion_kernels.ops.moe_routing import op
from tests.ops.routing_spelling import INF, LOSSES, NAN

STEM = "moe_routing"


def test_only_one_of_the_outputs_used(backend, device) -> None:
    """Weights alone, losses alone, and their sum: the gradients add up."""
    z = torch.randn(9, 8, device=device, requires_grad=True)
    routing = moe_route(z, 2, backend=backend, **LOSSES)
    pull = torch.randn(9, 2, device=device)
    parts = (routing.weights * pull).sum(), routing.aux_loss
    grads = [torch.autograd.grad(part, z, retain_graph=True)[0] for part in parts]
    (both,) = torch.autograd.grad(sum(parts), z)
    torch.testing.assert_close(both, grads[0] + grads[1])
    assert grads[1].abs().max() > 0


def test_only_the_logits_get_a_gradient(backend, device) -> None:
    z = torch.randn(3, 4, device=device)
    bias = torch.zeros(4, device=device, requires_grad=True)
    routing = moe_route(z, 2, selection_bias=bias, backend=backend)
    assert not routing.weights.requires_grad
    routing = moe_route(z.requires_grad_(), 2, selection_bias=bias, backend=backend)
    assert routing.weights.requires_grad
    assert not routing.counts.requires_grad
    routing.weights.sum().backward()
    assert bias.grad is None


def test_saved_bytes_follow_the_table(backend, device) -> None:
    """A router without losses keeps no [T, E] alive: renormalised softmax saves w and ids only."""
    z = torch.randn(32, 64, device=device, requires_grad=True)

    def saved(**options: Any) -> int:
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
            moe_route(z, 2, backend=backend, **options)
        return sum(x.numel() * x.element_size() for x in seen)

    slots = 32 * 2
    assert saved(renormalize=True) == slots * (4 + 8) + 64 * 8
    assert saved(score="sigmoid") == slots * (4 + 4 + 8) + 64 * 8
    assert saved() == slots * (4 + 8) + 64 * 8 + 32 * 64 * 4 + 32 * 4


def test_non_contiguous_logits(backend, device) -> None:
    z = torch.randn(8, 30, device=device).t().requires_grad_()
    bias = torch.randn(16, device=device)[::2]
    ours = moe_route(z, 3, selection_bias=bias, backend=backend, **LOSSES)
    again = moe_route(z.contiguous(), 3, selection_bias=bias, backend=backend, **LOSSES)
    assert all(map(torch.equal, ours, again))
    # expanded gradients have stride 0
    grads = [torch.autograd.grad(r.weights.sum() + r.aux_loss, z)[0] for r in (ours, again)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("score", ("softmax", "sigmoid"))
def test_same_bits_on_any_number_of_threads(score, backend, device) -> None:
    z = torch.randn(3000, 20, device=device, requires_grad=True)
    runs, threads = [], torch.get_num_threads()
    for count in (1, 2, 1, 2):
        torch.set_num_threads(count)
        routing = moe_route(z, 3, score=score, backend=backend, **LOSSES)
        (grad,) = torch.autograd.grad(routing.weights.square().sum() + routing.aux_loss, z)
        runs.append((*routing, grad))
    torch.set_num_threads(threads)
    if backend != "reference":
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_double_backward_is_refused(backend, device) -> None:
    z = torch.randn(3, 4, device=device, requires_grad=True)
    routing = moe_route(z, 2, backend=backend)
    (grad,) = torch.autograd.grad(routing.weights.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_registration(backend, device, monkeypatch) -> None:
    """opcheck of the opaque op with what the door really hands it."""
    calls = []
    monkeypatch.setattr(op, "_route", lambda *args: calls.append(args) or (None,) * 7)
    for case in CATALOG[STEM].cases:
        if case.quick:
            moe_route(**case.make(device, torch.float32, 0), backend=backend)
    assert len(calls) == 3
    for arguments in calls:
        torch.library.opcheck(torch.ops.deepfusion.moe_route.default, arguments)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_as_one_graph(dynamic, backend, device) -> None:
    torch._dynamo.reset()

    def step(z: Tensor) -> tuple[Tensor, Tensor]:
        routing = moe_route(z, 2, num_groups=2, top_groups=1, backend=backend, **LOSSES)
        return routing.weights.square().sum() + routing.aux_loss, routing.experts

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (5, 9):
        z = torch.randn(T, 6, device=device, requires_grad=True)
        (ours, ids), (plain, plain_ids) = compiled(z), step(z)
        assert torch.equal(ids, plain_ids)
        torch.testing.assert_close(ours, plain)
        grads = [torch.autograd.grad(out, z)[0] for out in (ours, plain)]
        assert torch.equal(*grads)


BAD = (
    ({"top_k": 0}, r"top_k must be within 1 .. 8, got 0"),
    ({"top_k": 9}, r"top_k must be within 1 .. 8, got 9"),
    ({"top_k": 5, "num_groups": 4, "top_groups": 2}, r"top_k must be within 1 .. 4, got 5"),
    ({"score": "tanh"}, r"score must be one of 'softmax', 'sigmoid', got 'tanh'"),
    ({"order": "topk"}, r"order must be one of"),
    ({"group_score": "sum"}, r"group_score must be one of"),
    ({"scale": 0.0}, r"scale must be finite and not 0, got 0.0"),
    ({"scale": NAN}, r"scale must be finite and not 0, got nan"),
    ({"z_loss_weight": INF}, r"z_loss_weight must be finite, got inf"),
    ({"num_groups": 4}, r"num_groups and top_groups must be given both or neither"),
    ({"num_groups": 3, "top_groups": 1}, r"num_groups must be a divisor of E = 8, got 3"),
    ({"num_groups": 4, "top_groups": 5}, r"top_groups must be within 1 .. 4, got 5"),
    (
        {"num_groups": 8, "top_groups": 8, "group_score": "top2_sum"},
        r"group_score must be 'max' where a group has fewer than 2 experts",
    ),
    ({"selection_bias": torch.zeros(7)}, r"selection_bias must be \[E\] = \[8\], got \[7\]"),
    ({"selection_bias": torch.zeros(8).long()}, r"selection_bias must have dtype"),
)


@pytest.mark.parametrize(
    "options, message", BAD, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_bad_input_is_named(options, message) -> None:
    with pytest.raises(ValueError, match="moe_route: " + message):
        moe_route(torch.zeros(3, 8), **{"top_k": 2, **options})


def test_bad_logits_are_named() -> None:
    with pytest.raises(ValueError, match=r"moe_route: router_logits must be \[T, E\], got \[8\]"):
        moe_route(torch.zeros(8), 2)
    with pytest.raises(ValueError, match=r"moe_route: router_logits must have dtype .*, got int64"):
        moe_route(torch.zeros(3, 8).long(), 2)
