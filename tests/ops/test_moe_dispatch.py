"""Plan, dispatch and combine: the plan's definition, the adjoint, every gradient, every edge."""

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import DispatchPlan, moe_combine, moe_dispatch, moe_plan
from tests.budget import assert_within_budget

STEM = "moe_dispatch"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1, 1, 1), (17, 33, 60, 4), (64, 515, 7, 7), (300, 100, 16, 2))


def draw(kind: str, T: int, K: int, E: int, dtype: torch.dtype = torch.int64) -> Tensor:
    ids = torch.randint(0, E, (T, K))
    if kind == "one_hot":
        ids = torch.full((T, K), E - 1)
    elif kind == "quarter_empty":
        ids = torch.randint(0, max(1, E * 3 // 4), (T, K))
    elif kind == "all_sentinels":
        ids = torch.where(ids % 2 == 0, -1, E)
    elif kind == "some_sentinels":
        ids = torch.randint(-2, E + 2, (T, K))
    return ids.to(dtype)


def one_hot(plan: DispatchPlan, dtype: torch.dtype) -> Tensor:
    """slots as a matrix: [T, K, R], the second spelling of everything here."""
    T, K = plan.slots.shape
    return (plan.slots[..., None] == torch.arange(T * K)).to(dtype)


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32), ids=("i64", "i32"))
@pytest.mark.parametrize("E", (1, 7, 60, 128, 1000))
@pytest.mark.parametrize(
    "kind", ("uniform", "one_hot", "quarter_empty", "all_sentinels", "some_sentinels")
)
def test_plan_is_the_stable_sort(kind, E, dtype, backend, device) -> None:
    T, K = 123, 4
    experts = draw(kind, T, K, E, dtype)
    plan = moe_plan(experts.to(device), E, backend=backend)
    assert {tensor.dtype for tensor in plan} == {torch.int32}
    order, slots, offsets = (tensor.cpu() for tensor in plan)

    flat = experts.flatten().tolist()
    real = [slot for slot in range(T * K) if 0 <= flat[slot] < E]
    wanted = sorted(real, key=lambda slot: flat[slot])
    assert order.tolist() == wanted + [-1] * (T * K - len(real))
    counts = [flat.count(expert) for expert in range(E)]
    assert offsets.tolist() == [sum(counts[:expert]) for expert in range(E + 1)]
    for slot, row in enumerate(slots.flatten().tolist()):
        assert row == (wanted.index(slot) if 0 <= flat[slot] < E else -1)


def test_ids_far_out_of_range_are_sentinels(backend, device) -> None:
    experts = torch.tensor([[2**32, 1], [-(2**40), 0]], device=device)
    plan = moe_plan(experts, 2, backend=backend)
    assert plan.slots.tolist() == [[-1, 1], [-1, 0]]
    assert plan.order.tolist() == [3, 1, -1, -1]


def eager(hidden: Tensor, plan: DispatchPlan, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch in the input dtype, by indexing: what dispatch gives, and its combine."""
    K = plan.slots.shape[1]
    valid = (plan.order >= 0)[:, None]
    rows = torch.where(valid, hidden[plan.order.clamp(min=0).long() // max(K, 1)], 0)
    return rows, eager_combine(rows, plan, weights)


def eager_combine(rows: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
    w = torch.where(plan.slots >= 0, weights, 0).to(rows.dtype)
    return (rows[plan.slots.clamp(min=0).long()] * w[..., None]).sum(1)


def gradients(output: Tensor, cotangent: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, leaves, cotangent.to(output.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-D{}-E{}-K{}".format(*s))
@pytest.mark.usefixtures("poisoned_memory")
def test_forward_and_gradient_within_budget(shape, dtype, backend, device) -> None:
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("cuda serves no float64")
    T, D, E, K = shape
    plan = DispatchPlan(*(p.to(device) for p in moe_plan(draw("some_sentinels", T, K, E), E)))
    hidden = torch.randn(T, D, device=device).to(dtype).requires_grad_()
    rows = torch.randn(T * K, D, device=device).to(dtype).requires_grad_()
    weights = torch.rand(T, K, device=device).requires_grad_()
    drows = torch.randn(T * K, D, device=device).to(dtype)
    dout = torch.randn(T, D, device=device).to(dtype)
    hidden64, rows64 = (x.detach().double().requires_grad_() for x in (hidden, rows))
    weights64 = weights.detach().double().requires_grad_()

    ours = moe_dispatch(hidden, plan, backend=backend)
    plain, _ = eager(hidden, plan, weights)
    assert torch.equal(ours, plain)
    truth = moe_dispatch(hidden64, plan, backend="reference")
    (ours,) = gradients(ours, drows, hidden)
    (plain,) = gradients(plain, drows, hidden)
    (truth,) = gradients(truth, drows, hidden64)
    assert ours.dtype == dtype
    assert_within_budget(ours, plain, truth, "dhidden")

    ours = moe_combine(rows, plan, weights, backend=backend)
    plain = eager_combine(rows, plan, weights)
    truth = moe_combine(rows64, plan, weights64, backend="reference")
    assert ours.dtype == dtype
    assert_within_budget(ours, plain, truth, "out")
    names = ("drows", "dweights")
    ours_grads = gradients(ours, dout, rows, weights)
    plain_grads = gradients(plain, dout, rows, weights)
    truth_grads = gradients(truth, dout, rows64, weights64)
    for name, a, b, c in zip(names, ours_grads, plain_grads, truth_grads, strict=True):
        assert_within_budget(a, b, c, name)


def test_reference_is_its_matrix() -> None:
    """Dispatch is S^T and combine is w S, with S the one-hot slots."""
    T, D, E, K = 6, 5, 4, 3
    plan = moe_plan(draw("some_sentinels", T, K, E), E)
    S = one_hot(plan, torch.float64)
    hidden = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(T * K, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    dispatched = moe_dispatch(hidden, plan, backend="reference")
    torch.testing.assert_close(dispatched, torch.einsum("tkr,td->rd", S, hidden))
    combined = moe_combine(rows, plan, weights, backend="reference")
    torch.testing.assert_close(combined, torch.einsum("tkr,tk,rd->td", S, weights, rows))
    assert torch.autograd.gradcheck(lambda x: moe_dispatch(x, plan, backend="reference"), hidden)
    assert torch.autograd.gradcheck(
        lambda y, w: moe_combine(y, plan, w, backend="reference"), (rows, weights)
    )


def test_dispatch_and_combine_are_adjoint(backend, device) -> None:
    """Whole numbers, whose sums are exact in float32."""
    T, D, E, K = 40, 24, 9, 3
    plan = moe_plan(draw("some_sentinels", T, K, E).to(device), E, backend=backend)
    x = torch.randint(-9, 10, (T, D), device=device).float()
    y = torch.randint(-9, 10, (T * K, D), device=device).float()
    ones = torch.ones(T, K, device=device)
    left = (moe_dispatch(x, plan, backend=backend) * y).sum()
    right = (x * moe_combine(y, plan, ones, backend=backend)).sum()
    assert left == right != 0


@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_leaks_through_sentinels(backend, device) -> None:
    """Token 1 has sentinels only, and NaN; token 0 has one, with a NaN weight."""
    nan = float("nan")
    plan = moe_plan(torch.tensor([[0, -1], [2, 5]], device=device), 2, backend=backend)
    hidden = torch.tensor([[1.0, 2.0], [nan, nan]], device=device, requires_grad=True)
    weights = torch.tensor([[0.5, nan], [nan, nan]], device=device, requires_grad=True)
    rows = moe_dispatch(hidden, plan, backend=backend)
    assert rows.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    out = moe_combine(rows, plan, weights, backend=backend)
    assert out.tolist() == [[0.5, 1.0], [0.0, 0.0]]
    cotangent = torch.tensor([[1.0, 1.0], [nan, nan]], device=device)
    dhidden, dweights = gradients(out, cotangent, hidden, weights)
    assert dhidden.tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert dweights.tolist() == [[3.0, 0.0], [0.0, 0.0]]


def test_duplicate_ids_count_twice(backend, device) -> None:
    plan = moe_plan(torch.tensor([[1, 1]], device=device), 2, backend=backend)
    rows = moe_dispatch(torch.ones(1, 3, device=device), plan, backend=backend)
    weights = torch.tensor([[0.25, 0.5]], device=device)
    assert moe_combine(rows, plan, weights, backend=backend).tolist() == [[0.75] * 3]


@pytest.mark.parametrize("T, D", ((0, 4), (3, 0)))
def test_empty(T, D, backend, device) -> None:
    plan = moe_plan(torch.zeros(T, 2, dtype=torch.int64, device=device), 3, backend=backend)
    assert plan.offsets.tolist() == [0, 2 * T, 2 * T, 2 * T]
    hidden = torch.zeros(T, D, device=device, requires_grad=True)
    weights = torch.ones(T, 2, device=device, requires_grad=True)
    rows = moe_dispatch(hidden, plan, backend=backend)
    out = moe_combine(rows, plan, weights, backend=backend)
    assert rows.shape == (2 * T, D)
    out.sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert torch.equal(weights.grad, torch.zeros(T, 2, device=device))


def test_every_half_survives_and_rounding_is_to_nearest_even(backend, device) -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(torch.float16)
    weights = torch.randn(2**16, device=device) * 2.0 ** torch.randint(-20, 6, (2**16,)).to(device)
    weights[:100] = 1.0 + torch.arange(100, device=device) * 2.0**-11
    plan = moe_plan(torch.zeros(2**16, 1, dtype=torch.int64, device=device), 1)
    for w in (torch.ones_like(weights), weights):
        ours = moe_combine(halves[:, None], plan, w[:, None], backend=backend)[:, 0]
        wanted = (halves.float() * w).half()
        assert torch.equal(ours.nan_to_num(7.0), wanted.nan_to_num(7.0))
        assert torch.equal(ours.isnan(), wanted.isnan())
