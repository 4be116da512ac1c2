"""Plan, dispatch and combine as ops: strides, bits, registration, compilation, refusals."""

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import moe_combine, moe_dispatch, moe_plan
from deepfusion_kernels.catalog import CATALOG

STEM = "moe_dispatch"


def test_only_wanted_gradients(backend, device) -> None:
    plan = moe_plan(torch.randint(0, 3, (5, 2)).to(device), 3, backend=backend)
    rows, weights = torch.randn(10, 4, device=device), torch.rand(5, 2, device=device)
    moe_combine(rows.requires_grad_(), plan, weights, backend=backend).sum().backward()
    assert rows.grad is not None
    assert weights.grad is None
    rows = rows.detach()
    moe_combine(rows, plan, weights.requires_grad_(), backend=backend).sum().backward()
    assert rows.grad is None
    torch.testing.assert_close(weights.grad, rows[plan.slots.long()].sum(-1))


def test_non_contiguous_inputs(backend, device) -> None:
    T, D, E, K = 9, 6, 4, 2
    experts = torch.randint(0, E, (K, T)).to(device).t()
    plan = moe_plan(experts, E, backend=backend)
    assert all(map(torch.equal, plan, moe_plan(experts.contiguous(), E, backend=backend)))
    hidden, weights = torch.randn(D, T, device=device).t(), torch.rand(K, T, device=device).t()
    rows = moe_dispatch(hidden, plan, backend=backend)
    assert torch.equal(rows, moe_dispatch(hidden.contiguous(), plan, backend=backend))
    spaced = torch.stack((rows, rows), 1)[:, 1].requires_grad_()
    out = moe_combine(spaced, plan, weights.requires_grad_(), backend=backend)
    again = moe_combine(rows, plan, weights.contiguous(), backend=backend)
    assert torch.equal(out, again)
    # sum gives a gradient of stride 0
    drows, dweights = torch.autograd.grad(out.sum(), (spaced, weights))
    torch.testing.assert_close(dweights, rows.sum(-1)[plan.slots.long()])
    torch.testing.assert_close(drows[:, 0], weights.flatten()[plan.order.long()])


def test_same_bits_ten_times(backend, device) -> None:
    T, D, E, K = 200, 96, 5, 4
    plan = moe_plan(torch.randint(0, E, (T, K)).to(device), E, backend=backend)
    rows = torch.randn(T * K, D, device=device, requires_grad=True)
    weights = torch.rand(T, K, device=device, requires_grad=True)
    runs = []
    for _ in range(10):
        out = moe_combine(rows, plan, weights, backend=backend)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (rows, weights))))
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_double_backward_is_refused(backend, device) -> None:
    plan = moe_plan(torch.zeros(2, 1, dtype=torch.int64, device=device), 1, backend=backend)
    hidden = torch.randn(2, 3, device=device, requires_grad=True)
    ones = torch.ones(2, 1, device=device, requires_grad=True)
    out = moe_combine(moe_dispatch(hidden, plan, backend=backend), plan, ones, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_registration(backend, device) -> None:
    for case in CATALOG[STEM].cases:
        if case.quick:
            arguments = case.make(device, torch.float32, 0)
            plan = arguments.get("plan", ())
            if case.door == "moe_plan":
                values = (arguments["experts"], arguments["num_experts"], backend)
            elif case.door == "moe_dispatch":
                values = (arguments["hidden"], *plan, backend)
            else:
                values = (arguments["rows"], arguments["weights"], *plan, backend)
            op = getattr(torch.ops.deepfusion, case.door).default
            torch.library.opcheck(op, values)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_as_one_graph(dynamic, backend, device) -> None:
    torch._dynamo.reset()

    def step(hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        plan = moe_plan(experts, 5, backend=backend)
        return moe_combine(moe_dispatch(hidden, plan, backend=backend), plan, weights)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (6, 11):
        hidden = torch.randn(T, 8, device=device, requires_grad=True)
        inputs = (hidden, torch.randint(0, 5, (T, 2)).to(device), torch.rand(T, 2, device=device))
        ours, plain = compiled(*inputs), step(*inputs)
        assert torch.equal(ours, plain)
        grads = [torch.autograd.grad(out.sum(), hidden)[0] for out in (ours, plain)]
        assert torch.equal(*grads)


def test_bad_input_is_named(backend, device) -> None:
    experts = torch.zeros(3, 2, dtype=torch.int64, device=device)
    plan = moe_plan(experts, 2, backend=backend)
    with pytest.raises(ValueError, match=r"moe_plan: experts must be \[T, K\], got \[3\]"):
        moe_plan(experts[:, 0], 2, backend=backend)
    with pytest.raises(ValueError, match=r"moe_plan: experts must have dtype int64, int32"):
        moe_plan(experts.float(), 2, backend=backend)
    with pytest.raises(ValueError, match=r"moe_plan: num_experts must be >= 1, got 0"):
        moe_plan(experts, 0, backend=backend)
    with pytest.raises(ValueError, match=r"moe_dispatch: plan.slots must be \[T, K\] = \[4, K\]"):
        moe_dispatch(torch.zeros(4, 5, device=device), plan, backend=backend)
    weights = torch.ones(3, 2, device=device)
    with pytest.raises(ValueError, match=r"moe_combine: rows must be \[R, D\] with R = 6, got 5"):
        moe_combine(torch.zeros(5, 5, device=device), plan, weights, backend=backend)
    with pytest.raises(ValueError, match=r"moe_combine: weights must have dtype"):
        moe_combine(torch.zeros(6, 5, device=device), plan, weights.long(), backend=backend)


@pytest.mark.parametrize("index", (-2, 6, 2**31 - 1))
def test_a_plan_that_leaves_its_buffer_is_refused(index) -> None:
    plan = moe_plan(torch.zeros(3, 2, dtype=torch.int64), 2)
    order, slots = plan.order.clone(), plan.slots.clone()
    order[1], slots[1, 0] = index, index
    with pytest.raises(RuntimeError, match=r"plan.order must be within -1 .. 5, got"):
        moe_dispatch(torch.ones(3, 4), plan._replace(order=order), backend="cpu")
    with pytest.raises(RuntimeError, match=r"plan.slots must be within -1 .. 5, got"):
        moe_combine(torch.ones(6, 4), plan._replace(slots=slots), torch.ones(3, 2), backend="cpu")
