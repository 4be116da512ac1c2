"""Attention over stages and patches: the law, masks, both sides of the tile of 64, edges."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import multi_stage_attention
from deepfusion_kernels.catalog import CATALOG
from tests.budget import UNIT, assert_within_budget
from tests.nn.alignment_spelling import attention

STEM = "view_aligned_attention"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# QKV, Y and dQKV are stored in half precision, and the result: docs/numerics.md
HALF_FLOOR = 1.5
LARGE = ("pat", "headline-causal")
CASES = [
    case
    for case in CATALOG[STEM].cases
    if case.door == "multi_stage_attention" and case.name not in LARGE
]


def eager(features, qkv_weight, *, num_heads, causal=False, patch_mask=None) -> Tensor:
    B, _, Q, _ = features.shape
    valid = torch.ones(B, Q, dtype=torch.bool) if patch_mask is None else patch_mask
    return attention(features, qkv_weight, num_heads, causal, valid)


def run(function, given: dict[str, Any], **options) -> list[Tensor]:
    """Y and the gradients for a fixed cotangent."""
    y = function(**given, **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    leaves = [given["features"], given["qkv_weight"]]
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        k: v.detach().to(dtype).requires_grad_() if isinstance(v, Tensor) and v.requires_grad else v
        for k, v in given.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=("f64", "f32", "bf16", "f16"))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_budget(case, dtype, backend, device, poisoned_memory) -> None:
    given = case.make(device, dtype, 0)
    ours = run(multi_stage_attention, given, backend=backend)
    plain = run(eager, given)
    truth = run(multi_stage_attention, cast(given, torch.float64), backend="reference")
    half = dtype in (torch.bfloat16, torch.float16)
    for name, *values in zip(("Y", "dX", "dWqkv"), ours, plain, truth, strict=True):
        floor = HALF_FLOOR * UNIT[dtype] * values[2].abs().max() if half else None
        assert_within_budget(*values, name, floor)


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_reference_equals_the_second_spelling(case) -> None:
    given = case.make(torch.device("cpu"), torch.float64, 0)
    for mine, other in zip(
        run(multi_stage_attention, given, backend="reference"), run(eager, given), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("Q", [63, 64, 65, 127, 128, 129])
def test_both_sides_of_the_tile(Q, causal, backend) -> None:
    given = {
        "features": torch.randn(1, 1, Q, 24).double().requires_grad_(),
        "qkv_weight": torch.randn(72, 24).double().requires_grad_(),
        "num_heads": 2,
        "causal": causal,
        "patch_mask": torch.rand(1, Q) > 0.3,
    }
    for mine, law in zip(
        run(multi_stage_attention, given, backend=backend),
        run(multi_stage_attention, given, backend="reference"), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, law, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal, backend) -> None:
    x, weight, bias = (torch.randn(s).double() for s in ((2, 2, 3, 4), (12, 4), (12,)))
    mask = torch.tensor([[True, False, True], [False, False, False]])

    def call(*leaves: Tensor) -> Tensor:
        return multi_stage_attention(
            *leaves[:2], num_heads=2, qkv_bias=leaves[2], causal=causal, patch_mask=mask,
            scale=0.3, backend=backend,
        )  # fmt: skip

    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    assert torch.autograd.gradcheck(call, leaves)
    assert not call(*leaves)[1].any()


def test_equation_8_by_hand_and_permuted_stages(backend) -> None:
    x, weight = torch.randn(1, 1, 5, 4).double(), torch.randn(12, 4).double()
    q, k, v = (x[0, 0] @ part.t() for part in weight.chunk(3))
    wanted = torch.softmax(q @ k.t() / 2, 1) @ v
    ours = multi_stage_attention(x, weight, num_heads=1, backend=backend)
    torch.testing.assert_close(ours[0, 0], wanted)
    x, order = torch.randn(2, 3, 5, 4).double(), [2, 0, 1]
    y = multi_stage_attention(x, weight, num_heads=2, causal=True, backend=backend)
    other = multi_stage_attention(x[:, order], weight, num_heads=2, causal=True, backend=backend)
    torch.testing.assert_close(y[:, order], other)


def test_extreme_scores_and_repeats(backend) -> None:
    x, weight = 100 * torch.randn(2, 2, 40, 16), torch.randn(48, 16)
    y = multi_stage_attention(x, weight, num_heads=2, backend=backend)
    assert y.isfinite().all()
    for _ in range(10):
        assert torch.equal(y, multi_stage_attention(x, weight, num_heads=2, backend=backend))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)])
def test_nothing_gives_nothing(shape, backend) -> None:
    x, weight = torch.randn(shape).requires_grad_(), torch.randn(12, 4).requires_grad_()
    y = multi_stage_attention(x, weight, num_heads=2, backend=backend)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert not weight.grad.any()


@pytest.mark.parametrize("changes, words", [
    ({"qkv_weight": torch.zeros(9, 4)}, "qkv_weight must be"),
    ({"qkv_weight": torch.zeros(12, 4).double()}, "qkv_weight must have dtype"),
    ({"qkv_bias": torch.zeros(4)}, "qkv_bias must be"),
    ({"num_heads": 3}, "num_heads must be a divisor of 4"),
    ({"patch_mask": torch.ones(2, 4).bool()}, "patch_mask must be"),
    ({"patch_mask": torch.ones(2, 3)}, "patch_mask must have dtype bool"),
    ({"features": torch.zeros(2, 0, 3, 4)}, "features must be"),
])  # fmt: skip
def test_refused_with_its_name(changes, words) -> None:
    given = {"features": torch.zeros(2, 2, 3, 4), "qkv_weight": torch.zeros(12, 4), "num_heads": 2}
    with pytest.raises(ValueError, match=words):
        multi_stage_attention(**given | changes)


def test_opcheck(backend) -> None:
    x, weight = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(24, 8, requires_grad=True)
    inputs = (x, weight, None, torch.rand(3, 5) > 0.3, 2, True, 0.5, backend)
    torch.library.opcheck(torch.ops.deepfusion.multi_stage_attention, inputs)
    stages = [torch.randn(2, 7, 3, requires_grad=True) for _ in range(2)]
    weight, bias = torch.randn(2, 4, 9, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    offsets = torch.tensor([[0, 3, 6, 7]] * 2, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.deepfusion.patch_projection,
        (stages, weight, bias, offsets, None, None, None, 3, backend),
    )
