"""Multi-stage attention's CUDA kernels, run on the host (tests/cuda_on_host.py)."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import multi_stage_attention
from deepfusion_kernels.ops.view_aligned_attention import native_cuda
from tests import cuda_on_host
from tests.budget import UNIT
from tests.ops.test_vaa_triton import assert_attention, attend, problem

STEM = "view_aligned_attention"
BACKENDS = ("cuda",)
pytestmark = pytest.mark.usefixtures("poisoned_memory")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    cuda_on_host.serve(monkeypatch, native_cuda)
    yield "cuda"
    cuda_on_host.set_schedule(0)


# dtype, B, S, Q, channels of a head, heads, causal: both kernels on both sides of their borders
SHAPES = {
    "P1": (F16, 1, 1, 1, 16, 1, False),
    "P64-f32": (F32, 2, 4, 16, 16, 2, True),
    "P65-f32": (F32, 2, 1, 65, 16, 1, False),
    "P64": (BF16, 2, 4, 16, 64, 1, True),
    "P127": (BF16, 1, 1, 127, 16, 1, True),
    "P128": (F16, 2, 4, 32, 32, 1, False),
    "P128, heads of 64": (F16, 1, 4, 32, 64, 1, True),
    "P129": (BF16, 2, 3, 43, 64, 1, True),
    "P132": (F16, 1, 4, 33, 16, 2, False),
    "heads of 32": (F32, 1, 1, 35, 32, 1, False),
    "heads of 64": (F32, 2, 3, 5, 64, 2, True),
    "heads of 128": (F32, 2, 2, 33, 128, 1, True),
    "heads of 128, bf16": (BF16, 2, 3, 7, 128, 2, True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_within_budget(shape: str, backend: str) -> None:
    """Forward and every gradient; the last sample sees nothing and is 0."""
    assert_attention(SHAPES[shape], backend)


def test_whole_heads_and_tiles_agree(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(F32, 2, 3, 21, 16, 2) | {
        "causal": True, "qkv_bias": torch.randn(96), "scale": 0.7,
    }  # fmt: skip
    whole = attend(given, backend)
    monkeypatch.setattr(native_cuda, "is_small", lambda *_: False)
    for mine, other in zip(whole, attend(given, backend), strict=True):
        bound = 2 * UNIT[F32] * float(mine.abs().max())
        torch.testing.assert_close(mine, other, rtol=0, atol=bound)


@pytest.mark.parametrize("small", (True, False), ids=("whole", "tiles"))
def test_bits_do_not_depend_on_who_runs_first(
    small: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A barrier that is missing shows when other warps or lanes run ahead."""
    monkeypatch.setattr(native_cuda, "is_small", lambda *_: small)
    for dtype, Q in ((BF16, 50), (F32, 21)):
        given = problem(dtype, 2, 2, Q, 32, 1) | {"causal": True}
        first = attend(given, backend)
        for seed in (1, 2, 3):
            cuda_on_host.set_schedule(seed)
            assert all(map(torch.equal, attend(given, backend), first))
        cuda_on_host.set_schedule(0)


@pytest.mark.parametrize("small", (True, False), ids=("whole", "tiles"))
def test_no_patch_sees_a_later_one(
    small: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly 0 in every stage if causal; not so otherwise."""
    monkeypatch.setattr(native_cuda, "is_small", lambda *_: small)
    for causal in (True, False):
        x = torch.randn(1, 3, 9, 16, requires_grad=True)
        weight = torch.randn(48, 16)
        y = multi_stage_attention(x, weight, num_heads=1, causal=causal, backend=backend)
        (dx,) = torch.autograd.grad(y[:, :, 4].sum(), x)
        assert dx[:, :, :5].any(3).all()
        assert bool(dx[:, :, 5:].any()) != causal


def test_strided_features_and_odd_beginnings(backend: str) -> None:
    """Rows are read in place where 16 bytes can be read at once, else copied."""
    weight = torch.randn(96, 32)
    whole = torch.randn(2, 4, 7, 48)
    for x in (
        whole[:, 1:, 2:, :32],
        whole[..., 3:35],
        whole[..., ::2][..., :16].repeat(1, 1, 1, 2),
    ):
        y = multi_stage_attention(x, weight, num_heads=2, backend=backend)
        dense = multi_stage_attention(x.contiguous(), weight, num_heads=2, backend=backend)
        assert torch.equal(y, dense)
    shifted = torch.randn(96 * 32 + 1)[1:].view(96, 32)
    mine = multi_stage_attention(whole[..., :32], shifted, num_heads=2, backend=backend)
    assert torch.equal(
        mine, multi_stage_attention(whole[..., :32], shifted.clone(), num_heads=2, backend=backend)
    )


@pytest.mark.parametrize("small", (True, False), ids=("whole", "tiles"))
def test_extreme_scores(small: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cuda, "is_small", lambda *_: small)
    given = problem(F32, 2, 2, 20, 16, 1)
    given["features"] *= 100
    ours = attend(given, backend)
    assert all(part.isfinite().all() for part in ours)
    given["features"][0, 1, 3, 5] = torch.nan
    spoilt: Tensor = attend(given, backend)[0]
    assert spoilt[0].isnan().any()
    assert not spoilt[1].isnan().any()


@pytest.mark.parametrize("shape", [(0, 2, 3, 16), (2, 2, 0, 16)])
def test_nothing_gives_nothing(shape: tuple[int, ...], backend: str) -> None:
    x, weight = torch.randn(shape).requires_grad_(), torch.randn(48, 16).requires_grad_()
    y = multi_stage_attention(x, weight, num_heads=1, backend=backend)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert weight.grad is not None
    assert not weight.grad.any()


def test_declined_with_the_reason(backend: str) -> None:
    x, weight = torch.zeros(1, 1, 2, 24), torch.zeros(72, 24)
    with pytest.raises(NotImplementedError, match=r"cuda: needs heads of .* D / num_heads = 24"):
        multi_stage_attention(x, weight, num_heads=1, backend=backend)
    with pytest.raises(NotImplementedError, match=r"cuda: .* got float64"):
        multi_stage_attention(x.double(), weight.double(), num_heads=1, backend=backend)


def test_opcheck(backend: str) -> None:
    """What full graphs need besides is the op's own, and tested with the other backends."""
    x, weight = torch.randn(2, 1, 3, 16, requires_grad=True), torch.randn(48, 16).requires_grad_()
    valid = torch.rand(1, 3) > 0.3
    inputs = (x, weight, None, valid, 1, True, 0.5, backend)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.deepfusion.multi_stage_attention, inputs, test_utils=tests)
