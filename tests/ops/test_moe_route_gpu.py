"""The router and the plan in CUDA C++ on a GPU: graphs, synchronisation, launches, large offsets.

What each computes is tested in the stems' own files, for every backend that the machine has.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

from deepfusion_kernels import moe_combine, moe_dispatch, moe_plan, moe_route
from tests.budget import assert_within_budget
from tests.conftest import why_not
from tests.ops.captured_graph import assert_a_captured_graph_follows
from tests.ops.routing_spelling import LOSSES, MODES, name_of, route, with_groups

# `make gpu OPS=...` runs the file for each of them
STEMS = ("moe_routing", "moe_dispatch")
pytestmark = pytest.mark.gpu
V3: dict[str, Any] = {
    "score": "sigmoid",
    "renormalize": True,
    "scale": 2.5,
    "num_groups": 8,
    "top_groups": 4,
    "group_score": "top2_sum",
}


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    reason = why_not("cuda")
    if reason:
        pytest.skip(reason)


def whole(T: int, E: int, K: int, D: int) -> tuple[list[Tensor], Callable[[], tuple[Tensor, ...]]]:
    """What a call reads, and the call: route, plan, dispatch, combine, and every gradient."""
    z = torch.randn(T, E, device="cuda").bfloat16().requires_grad_()
    x = torch.randn(T, D, device="cuda").bfloat16().requires_grad_()
    pull = torch.randn(T, D, device="cuda").bfloat16()
    one = torch.ones((), device="cuda")

    def call() -> tuple[Tensor, ...]:
        routing = moe_route(z, K, backend="cuda", **V3, **LOSSES)
        plan = moe_plan(routing.experts, E, backend="cuda")
        rows = moe_dispatch(x, plan, backend="cuda")
        out = moe_combine(rows, plan, routing.weights, backend="cuda")
        grads = torch.autograd.grad((out, routing.aux_loss), (z, x), (pull, one))
        return (out.detach(), routing.aux_loss.detach(), routing.counts, *plan, *grads)

    return [z, x, pull], call


SIZES = ((300, 64, 4, 96), (3000, 256, 8, 515))


@pytest.mark.parametrize("size", SIZES, ids=("one-block", "blocks"))
def test_repeated_calls_give_the_same_bits(size: tuple[int, ...]) -> None:
    _, call = whole(*size)
    first = call()
    for _ in range(10):
        assert all(torch.equal(one, other) for one, other in zip(call(), first, strict=True))


@pytest.mark.parametrize("size", SIZES, ids=("one-block", "blocks"))
def test_no_call_waits_for_the_device(size: tuple[int, ...]) -> None:
    _, call = whole(*size)
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("size", SIZES, ids=("one-block", "blocks"))
def test_a_captured_graph_follows_its_inputs(size: tuple[int, ...]) -> None:
    inputs, call = whole(*size)

    def change_inputs() -> None:
        for tensor in inputs:
            tensor.copy_(torch.randn_like(tensor))

    assert_a_captured_graph_follows(call, change_inputs)


def launches(call: Callable[[], Any]) -> list[str]:
    """Everything that the device ran for the call, by name."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]


@pytest.mark.parametrize("mode", ({"renormalize": True}, {**V3, **LOSSES}), ids=("qwen", "v3"))
def test_launches_of_the_router(mode: dict[str, Any]) -> None:
    z = torch.randn(2048, 64, device="cuda").bfloat16().requires_grad_()
    assert len(launches(lambda: moe_route(z, 4, backend="cuda", **mode))) == 2
    routing = moe_route(z, 4, backend="cuda", **mode)
    ones = torch.ones_like(routing.weights), torch.ones_like(routing.aux_loss)
    outputs = routing.weights, routing.aux_loss
    gradient = lambda: torch.autograd.grad(outputs, z, ones, retain_graph=True)  # noqa: E731
    assert len(launches(gradient)) == 1


@pytest.mark.parametrize("T, wanted", ((1024, 1), (16384, 3)))
def test_launches_of_plan_dispatch_and_combine(T: int, wanted: int) -> None:
    E, K, D = 128, 8, 64
    experts = torch.randint(E, (T, K), device="cuda")
    assert len(launches(lambda: moe_plan(experts, E, backend="cuda"))) == wanted
    plan = moe_plan(experts, E, backend="cuda")
    hidden = torch.randn(T, D, device="cuda").requires_grad_()
    weights = torch.rand(T, K, device="cuda").requires_grad_()
    assert len(launches(lambda: moe_dispatch(hidden, plan, backend="cuda"))) == 1
    rows = moe_dispatch(hidden, plan, backend="cuda")
    out = moe_combine(rows, plan, weights, backend="cuda")
    assert len(launches(lambda: moe_combine(rows, plan, weights, backend="cuda"))) == 1
    ones = torch.ones_like(out)
    backward = lambda: torch.autograd.grad(out, (rows, weights), ones, retain_graph=True)  # noqa: E731
    assert len(launches(backward)) == 1


@pytest.mark.parametrize("E, K", ((16, 2), (128, 8), (256, 8), (400, 20), (1024, 40)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_many_rows_within_budget(E: int, K: int, dtype: torch.dtype) -> None:
    """Several rows a warp and several blocks; modes whose choice compares logits, so exactly."""
    T = 6000
    z = torch.randn(T, E, device="cuda").to(dtype)
    pull = torch.randn(T, K, device="cuda")
    for mode in MODES:
        if mode.get("group_score") == "top2_sum":
            continue
        mode = {**with_groups(mode, 8, 4), **LOSSES}
        found = []
        for leaf, chosen in (
            (z.double(), "reference"),
            (z.clone(), "reference"),
            (z.clone(), "cuda"),
        ):
            routing = route(leaf.requires_grad_(), K, mode, None, chosen)
            total = (routing.weights * pull.to(routing.weights.dtype)).sum() + routing.aux_loss
            found.append((*routing, torch.autograd.grad(total, leaf)[0]))
        truth, eager, ours = found
        assert torch.equal(ours[1], truth[1])
        assert torch.equal(ours[2], truth[2])
        for what, index in (("weights", 0), ("aux_loss", 3), ("dlogits", 4)):
            a, b, c = (results[index].detach() for results in (ours, eager, truth))
            assert_within_budget(a, b, c, f"{what} of {name_of(mode)}")


@pytest.mark.parametrize("kind", ("uniform", "one_hot", "sentinels"))
@pytest.mark.parametrize("T", (1025, 40000, 500000))
def test_plan_of_many_blocks_is_the_stable_sort(T: int, kind: str) -> None:
    E, K = 1000, 8
    experts = torch.randint(-1 if kind == "sentinels" else 0, E + 1, (T, K), device="cuda")
    experts = experts.clamp(max=E - 1) if kind == "uniform" else experts
    experts = torch.full_like(experts, 7) if kind == "one_hot" else experts
    ours = moe_plan(experts, E, backend="cuda")
    assert all(map(torch.equal, ours, moe_plan(experts, E, backend="reference")))


def test_offsets_past_two_to_the_31() -> None:
    """The last rows and tokens of 2.15e9 elements, against indexing."""
    T, D, E, K, last = 131200, 2048, 64, 8, 50
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    assert T * K * D > 2**31
    experts = torch.randint(E, (T, K), device="cuda")
    plan = moe_plan(experts, E, backend="cuda")
    hidden = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(T, K, device="cuda").requires_grad_()
    rows = moe_dispatch(hidden, plan, backend="cuda")
    assert torch.equal(rows[-last:], hidden[plan.order[-last:].long() // K])
    assert torch.equal(rows[:last], hidden[plan.order[:last].long() // K])
    rows.requires_grad_()
    out = moe_combine(rows, plan, weights, backend="cuda")
    picked = rows[plan.slots[-last:].long()].double()
    truth = (picked * weights[-last:, :, None].double()).sum(1)
    assert_within_budget(out[-last:].detach(), truth.bfloat16(), truth.detach(), "out")
    drows, dweights = torch.autograd.grad(out, (rows, weights), hidden)
    slots = plan.order[-last:].long()
    wanted = weights.flatten()[slots, None].double() * hidden[slots // K].double()
    assert_within_budget(drows[-last:], wanted.bfloat16(), wanted.detach(), "drows")
    truth = (picked * hidden[-last:, None].double()).sum(-1)
    assert_within_budget(dweights[-last:], truth.float(), truth.detach(), "dweights")


def test_what_cuda_does_not_serve_goes_to_the_reference() -> None:
    z = torch.randn(3, 1025, device="cuda")
    with pytest.raises(NotImplementedError, match="cuda: moe_route serves at most 1024 experts"):
        moe_route(z, 2, backend="cuda")
    experts = moe_route(z, 2).experts
    with pytest.raises(NotImplementedError, match="cuda: moe_plan serves at most 1024 experts"):
        moe_plan(experts, 1025, backend="cuda")
    assert moe_plan(experts, 1025).offsets[-1] == 6
