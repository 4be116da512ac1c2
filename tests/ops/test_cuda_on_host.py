"""The MoE ops' own tests on their CUDA kernels, run on the host (tests/cuda_on_host.py).

The tests are those of test_moe_routing*.py and test_moe_dispatch*.py: imported, they take this
module's fixtures, so that backend="cuda" serves CPU tensors.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import moe_combine, moe_dispatch, moe_plan, moe_route
from deepfusion_kernels.ops.moe_dispatch import native_impl as dispatch_impl
from deepfusion_kernels.ops.moe_routing import native_impl as routing_impl
from tests import cuda_on_host
from tests.ops import test_moe_dispatch, test_moe_routing
from tests.ops.routing_spelling import LOSSES, MODES
from tests.ops.test_moe_dispatch import (  # noqa: F401
    test_dispatch_and_combine_are_adjoint,
    test_duplicate_ids_count_twice,
    test_empty,
    test_ids_far_out_of_range_are_sentinels,
    test_nothing_leaks_through_sentinels,
)
from tests.ops.test_moe_dispatch_waist import (  # noqa: F401
    test_non_contiguous_inputs,
    test_only_wanted_gradients,
)
from tests.ops.test_moe_routing import test_ties_go_to_the_lowest_index  # noqa: F401
from tests.ops.test_moe_routing_edges import (  # noqa: F401
    test_a_group_of_both_infinities_sorts_last,
    test_balanced_layer_has_balance_loss_k,
    test_extreme_logits,
    test_masked_experts_get_weight_zero,
    test_nan_and_infinite_logits,
    test_no_tokens,
    test_one_selected_softmax_warns_and_is_constant,
)
from tests.ops.test_moe_routing_waist import (  # noqa: F401
    test_non_contiguous_logits,
    test_only_one_of_the_outputs_used,
)

STEM = "moe_routing"
BACKENDS = ("cuda",)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    cuda_on_host.serve(monkeypatch, dispatch_impl, routing_impl)
    yield "cuda"
    cuda_on_host.set_schedule(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


# every count of values a lane holds; all modes on the smallest, of the others some
@pytest.mark.parametrize(
    "size, dtype, modes",
    (
        ((7, 2, 1), F32, slice(None)),
        ((1, 1, 1), F32, slice(0, None, 3)),
        ((64, 6, 8), BF16, slice(1, None, 5)),
        ((128, 8, 8), F16, slice(2, None, 5)),
        ((250, 8, 125), BF16, slice(3, None, 8)),
        ((500, 20, 50), F32, slice(4, None, 9)),
        ((1000, 32, 10), BF16, slice(5, None, 9)),
    ),
    ids=lambda value: f"E{value[0]}-K{value[1]}" if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("poisoned_memory")
def test_modes_within_budget(
    size: tuple[int, int, int], dtype: torch.dtype, modes: slice, backend: str,
    device: torch.device, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(test_moe_routing, "MODES", MODES[modes])
    test_moe_routing.test_every_mode_within_budget(size, dtype, backend, device)


@pytest.mark.parametrize("E", (1, 60, 1000))
@pytest.mark.parametrize("kind", ("one_hot", "some_sentinels", "all_sentinels"))
def test_plan_of_one_block(kind: str, E: int, backend: str, device: torch.device) -> None:
    dtype = torch.int32 if E == 60 else torch.int64
    test_moe_dispatch.test_plan_is_the_stable_sort(kind, E, dtype, backend, device)


@pytest.mark.parametrize("R, E", ((8193, 7), (10001, 1024), (30_001, 3)))
def test_plan_of_many_blocks(R: int, E: int, backend: str) -> None:
    experts = torch.randint(-1, E + 1, (R, 1), dtype=torch.int32)
    wanted = moe_plan(experts, E, backend="reference")
    assert all(map(torch.equal, moe_plan(experts, E, backend=backend), wanted))


@pytest.mark.parametrize("shape", ((17, 33, 60, 4), (20, 515, 7, 7), (30, 264, 16, 2)))
@pytest.mark.parametrize("dtype", (F32, BF16, F16))
@pytest.mark.usefixtures("poisoned_memory")
def test_rows_within_budget(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    test_moe_dispatch.test_forward_and_gradient_within_budget(shape, dtype, backend, device)


def route_all() -> tuple[Tensor, ...]:
    z = torch.randn(40, 100, generator=torch.Generator().manual_seed(0)).requires_grad_()
    options = {"num_groups": 10, "top_groups": 4, "group_score": "top2_sum", **LOSSES}
    routing = moe_route(z, 6, backend="cuda", score="sigmoid", renormalize=True, **options)
    total = routing.weights.square().sum() + routing.aux_loss
    return (*routing, *torch.autograd.grad(total, z))


def plan_all() -> tuple[Tensor, ...]:
    experts = torch.randint(-1, 9, (9000, 1), generator=torch.Generator().manual_seed(0))
    return (*moe_plan(experts, 8, backend="cuda"), *moe_plan(experts[:777], 8, backend="cuda"))


def move_all() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    plan = moe_plan(torch.randint(-1, 9, (30, 4), generator=generator), 8, backend="cuda")
    hidden = torch.randn(30, 72, generator=generator).requires_grad_()
    weights = torch.rand(30, 4, generator=generator).requires_grad_()
    out = moe_combine(moe_dispatch(hidden, plan, backend="cuda"), plan, weights, backend="cuda")
    return (out, *torch.autograd.grad(out.square().sum(), (hidden, weights)))


@pytest.mark.parametrize("call", (route_all, plan_all, move_all))
def test_bits_do_not_depend_on_who_runs_first(
    call: Callable[[], tuple[Tensor, ...]], backend: str
) -> None:
    """A barrier that is missing shows when other warps or lanes run ahead."""
    first = call()
    for seed in (1, 2, 3):
        cuda_on_host.set_schedule(seed)
        assert all(torch.equal(one, other) for one, other in zip(call(), first, strict=True))


def test_a_plan_that_leaves_its_buffer_gives_nan(backend: str) -> None:
    plan = moe_plan(torch.zeros(3, 2, dtype=torch.int64), 2)
    order, slots = plan.order.clone(), plan.slots.clone()
    order[1], slots[1, 0] = 6, -2
    rows = moe_dispatch(torch.ones(3, 5), plan._replace(order=order), backend=backend)
    assert rows.isnan().all(1).tolist() == [False, True, False, False, False, False]
    weights = torch.ones(3, 2).requires_grad_()
    out = moe_combine(torch.ones(6, 5), plan._replace(slots=slots), weights, backend=backend)
    assert out.isnan().all(1).tolist() == [False, True, False]
    (dweights,) = torch.autograd.grad(out.sum(), weights)
    assert dweights.isnan().nonzero().tolist() == [[1, 0]]


def test_what_is_not_served_is_declined(backend: str) -> None:
    with pytest.raises(NotImplementedError, match="cuda: moe_route serves at most 1024 experts"):
        moe_route(torch.randn(2, 1025), 2, backend=backend)
    with pytest.raises(NotImplementedError, match="cuda: moe_plan serves at most 1024 experts"):
        moe_plan(torch.zeros(2, 1, dtype=torch.int64), 1025, backend=backend)
    plan = moe_plan(torch.zeros(2, 1, dtype=torch.int64), 3, backend=backend)
    with pytest.raises(NotImplementedError, match=r"cuda: rows must be .*, got float64"):
        moe_dispatch(torch.randn(2, 3).double(), plan, backend=backend)
    with pytest.raises(NotImplementedError, match=r"cuda: moe_route serves .*, got float64"):
        moe_route(torch.randn(2, 3).double(), 2, backend=backend)
