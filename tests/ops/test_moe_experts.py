"""moe_experts: the law, every backend within its budget, and the edge table."""

import pytest
import torch

from deepfusion_kernels import moe_experts
from tests.ops.moe_experts_inputs import ACTIVATIONS, NAMES, compare, make, run, spelled_as_einsum

STEM = "moe_experts"


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_reference_passes_gradcheck(activation):
    inputs = make(5, 3, 2, 3, 2, torch.float64)
    inputs["experts"] = torch.tensor([[0, 1], [2, 2], [-1, 0], [3, -1], [0, 0]])

    def call(*tensors):
        named = dict(zip(NAMES, tensors, strict=True))
        return moe_experts(
            **named, experts=inputs["experts"], activation=activation, backend="reference"
        )

    assert torch.autograd.gradcheck(call, [inputs[name] for name in NAMES])


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_reference_equals_second_spelling(activation):
    inputs = make(31, 7, 6, 5, 3, torch.float64)
    inputs["experts"][::4, 1] = -1
    inputs["experts"][::5, 2] = 5
    dout = torch.randn(31, 7, dtype=torch.float64)
    ours = run(moe_experts, inputs, dout, activation=activation, backend="reference")
    other = run(spelled_as_einsum, inputs, dout, activation=activation)
    for name in ours:
        torch.testing.assert_close(ours[name], other[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_output_and_gradients_within_budget(backend, device, dtype, activation, poisoned_memory):
    compare(make(67, 45, 37, 5, 2, dtype, device=device), backend, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "T, D, F, E, K",
    [
        (1, 16, 8, 4, 2),
        (17, 5, 3, 1, 1),
        (300, 64, 48, 7, 3),
        (640, 33, 31, 2, 1),
        (8, 96, 160, 60, 4),
    ],
)
def test_shapes_within_budget(backend, device, dtype, T, D, F, E, K, poisoned_memory):
    compare(make(T, D, F, E, K, dtype, ids=torch.int32, device=device), backend)


def test_long_sums_stay_within_budget(backend, device):
    # one expert's rows fill several blocks and several pieces of the sum over rows
    compare(make(1500, 24, 40, 1, 1, torch.float32, device=device), backend)


@pytest.mark.parametrize("T, D, F", [(20, 1300, 600), (17, 1, 1)])
def test_widths_within_budget(backend, device, T, D, F):
    compare(make(T, D, F, 2, 1, torch.float32, device=device), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens(backend, device, dtype, poisoned_memory):
    inputs = make(0, 6, 4, 3, 2, dtype, device=device)
    result = run(
        moe_experts, inputs, torch.empty(0, 6, dtype=dtype, device=device), backend=backend
    )
    assert result["out"].shape == (0, 6)
    for name in NAMES:
        assert result[name].shape == inputs[name].shape
        assert not result[name].any()


def test_empty_expert_gets_zero_gradient(backend, device, poisoned_memory):
    inputs = make(20, 10, 6, 4, 2, device=device)
    inputs["experts"] = inputs["experts"] % 2 * 3
    result = compare(inputs, backend)
    assert not result["gate_up_proj"][1:3].any()
    assert not result["down_proj"][1:3].any()
    assert result["gate_up_proj"][0].any()


def test_duplicates_count_twice(backend, device):
    inputs = make(9, 10, 6, 4, 2, device=device)
    inputs["experts"][:, 1] = inputs["experts"][:, 0]
    compare(inputs, backend)
    once = inputs | {
        "experts": inputs["experts"][:, :1],
        "weights": inputs["weights"].sum(1, keepdim=True),
    }
    once = moe_experts(**once, backend=backend)
    torch.testing.assert_close(moe_experts(**inputs, backend=backend), once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sentinels_take_no_part(backend, device, dtype, poisoned_memory):
    inputs = make(21, 10, 6, 4, 2, dtype, device=device)
    inputs["experts"][3, 1], inputs["experts"][5, 0], inputs["experts"][7] = -1, 4, -3
    without = run(
        moe_experts, inputs, torch.ones(21, 10, dtype=dtype, device=device), backend=backend
    )
    with torch.no_grad():
        inputs["weights"][3, 1] = inputs["weights"][5, 0] = torch.nan
        inputs["weights"][7] = inputs["hidden"][7] = torch.nan
    result = run(
        moe_experts, inputs, torch.ones(21, 10, dtype=dtype, device=device), backend=backend
    )
    for name, value in result.items():
        assert torch.equal(value, without[name]), name
    assert not result["out"][7].any()
    assert not result["hidden"][7].any()
    assert not result["weights"][7].any()
    assert result["weights"][3, 1] == result["weights"][5, 0] == 0


def test_all_sentinels(backend, device, poisoned_memory):
    inputs = make(6, 10, 6, 4, 2, device=device)
    inputs["experts"].fill_(4)
    for name, value in run(
        moe_experts, inputs, torch.ones(6, 10, device=device), backend=backend
    ).items():
        assert not value.any(), name


def test_nan_stays_in_its_token(backend, device):
    inputs = make(12, 10, 6, 2, 2, device=device)
    with torch.no_grad():
        inputs["hidden"][4, 3] = torch.nan
    out = moe_experts(**inputs, backend=backend)
    assert out[4].isnan().all()
    assert out[torch.arange(12) != 4].isfinite().all()


def test_extremes_within_budget(backend, device):
    inputs = make(12, 10, 6, 2, 2, device=device)
    with torch.no_grad():
        inputs["hidden"].mul_(100)
    compare(inputs, backend)


def test_gradients_of_many_megabytes(backend, device):
    """Their memory is kept when freed and written past the cache: stale values would show."""
    E = 8
    inputs = make(70, 256, 352, E, 2, device=device)
    assert inputs["gate_up_proj"].nbytes > 4 << 20
    inputs["experts"].clamp_(max=E - 2)
    held = compare(inputs, backend)
    copies = {name: each.clone() for name, each in held.items()}
    for _ in range(2):
        # the first of these is freed before the second begins
        again = compare(inputs | {"hidden": (inputs["hidden"] * 2).detach()}, backend)
        assert not again["gate_up_proj"][E - 1].any()
    assert all(torch.equal(held[name], copies[name]) for name in copies)
