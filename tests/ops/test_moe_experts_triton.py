"""moe_experts by Triton and by grouped_mm: the edge table in the interpreter's sizes."""

import itertools

import pytest
import torch
from torch.nn import functional

from deepfusion_kernels import moe_experts
from deepfusion_kernels.catalog import CATALOG
from deepfusion_kernels.ops.moe_experts import torch_impl
from tests.conftest import device_for
from tests.ops.moe_experts_inputs import ACTIVATIONS, NAMES, compare, make, run
from tests.ops.test_moe_experts import (  # noqa: F401
    test_all_sentinels,
    test_duplicates_count_twice,
    test_empty_expert_gets_zero_gradient,
    test_nan_stays_in_its_token,
    test_no_tokens,
    test_sentinels_take_no_part,
)
from tests.ops.test_moe_experts_waist import (  # noqa: F401
    test_autocast_lowers_the_products,
    test_compiles_as_one_graph,
    test_double_backward_raises,
    test_saved_bytes_are_h_and_the_plan,
    test_strided_inputs,
    test_weights_keep_their_dtype,
)

STEM = "moe_experts"
BACKENDS = ("triton", "torch")


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_within_budget(backend, device, activation, poisoned_memory):
    compare(make(13, 21, 18, 3, 2, device=device), backend, activation)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_narrow_dtypes_within_budget(backend, device, dtype, poisoned_memory):
    # the interpreter wants few experts
    shape = (67, 45, 37, 5, 2) if backend == "torch" else (67, 45, 37, 2, 2)
    compare(make(*shape, dtype, ids=torch.int32, device=device), backend, "gelu_tanh")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "T, D, F, E, K",
    [(1, 16, 8, 4, 2), (1, 1, 1, 1, 1), (70, 5, 3, 1, 1), (5, 33, 65, 12, 4), (3, 130, 70, 2, 2)],
)
def test_shapes_within_budget(backend, device, dtype, T, D, F, E, K, poisoned_memory):
    """One token, one column, every row at one expert, more experts than rows, long products."""
    compare(make(T, D, F, E, K, dtype, device=device), backend)


def coarse(product):
    """Two bits less of bfloat16, cut off."""
    return (product.view(torch.int16) & ~3).view(torch.bfloat16)


@pytest.mark.parametrize(
    "fault",
    [coarse, lambda product: product * (1 + 2**-6), lambda product: product.roll(1, 1)],
    ids=["two-bits-cut", "scaled", "shifted"],
)
def test_counted_roundings_do_not_cover_a_fault(fault, monkeypatch):
    original = torch_impl._Grouped.rows
    monkeypatch.setattr(torch_impl._Grouped, "rows", lambda *args: fault(original(*args)))
    inputs = make(5, 33, 65, 12, 4, torch.bfloat16, device=device_for("torch"))
    with pytest.raises(AssertionError, match=r"allowed"):
        compare(inputs, "torch")


def test_every_set_of_wanted_gradients(backend, device, poisoned_memory, monkeypatch):
    inputs = make(5, 14, 10, 2, 2, device=device)
    dout = torch.randn(5, 14, device=device)
    everything = run(moe_experts, inputs, dout, backend=backend)
    impl = CATALOG[STEM].impls[backend]
    made, original = [], impl.backward

    def counted(*args):
        grads = original(*args)
        made.append(len(grads))
        return grads

    monkeypatch.setattr(impl, "backward", counted)
    for count in range(1, 4):
        for wanted in itertools.combinations(NAMES, count):
            leaves = {name: each.detach() for name, each in inputs.items()}
            for name in wanted:
                leaves[name].requires_grad_()
            moe_experts(**leaves, backend=backend).backward(dout)
            assert made.pop() == count
            for name in wanted:
                assert torch.equal(leaves[name].grad, everything[name]), (wanted, name)


def test_same_bits_every_time(backend, device):
    inputs = make(40, 24, 20, 3, 2, torch.bfloat16, device=device)
    dout = torch.randn_like(inputs["hidden"])
    first, again = (run(moe_experts, inputs, dout, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_float64_is_refused(backend, device):
    with pytest.raises(NotImplementedError, match=f"{backend}: .* got float64"):
        moe_experts(**make(2, 3, 2, 2, 1, torch.float64, device=device), backend=backend)


def test_rows_that_no_slot_takes_are_masked(monkeypatch):
    """Whatever grouped_mm leaves past the last expert's rows, here NaN, must not show."""
    device, backend = device_for("torch"), "torch"
    original = functional.grouped_mm

    def poisoned(left, right, *, offs):
        product = original(left, right, offs=offs)
        if product.ndim == 2:
            product[int(offs[-1]) :] = torch.nan
        return product

    inputs = make(11, 24, 16, 3, 2, device=device)
    inputs["experts"][::2, 0], inputs["experts"][3] = -1, 3
    dout = torch.randn(11, 24, device=device)
    clean = run(moe_experts, inputs, dout, backend=backend)
    monkeypatch.setattr(functional, "grouped_mm", poisoned)
    for name, value in run(moe_experts, inputs, dout, backend=backend).items():
        assert torch.equal(value, clean[name]), name
