"""View-aligned attention on a GPU: graphs, synchronisation, repetition, the headline's shape."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import fused_linear_mse, multi_stage_attention, view_aligned_attention
from deepfusion_kernels.catalog import CATALOG
from deepfusion_kernels.ops.view_aligned_attention import native_cuda, triton_attention
from tests.budget import UNIT, assert_within_budget
from tests.conftest import why_not
from tests.nn.alignment_spelling import draw, feature_loss
from tests.nn.alignment_variants import PARAMETERS, VARIANTS, arguments
from tests.ops.captured_graph import assert_a_captured_graph_follows

# `make gpu OPS=...` runs the file for each of them
STEMS = ("view_aligned_attention", "fused_linear_mse")
pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = {"B": 3, "T": 133, "H": 48, "M": 72, "D": 64, "p": 4, "heads": 2}
Call = Callable[[], tuple[Tensor, ...]]


@pytest.fixture(params=["triton", "cuda"])
def chosen(request: pytest.FixtureRequest) -> str:
    reason = why_not(request.param)
    if reason:
        pytest.skip(reason)
    name: str = request.param
    return name


def moved(value: Any) -> Any:
    if isinstance(value, list):
        return [moved(item) for item in value]
    return value.cuda() if isinstance(value, Tensor) else value


def gradients_of(loss: Tensor, given: dict[str, Any]) -> tuple[Tensor, ...]:
    leaves = [*given["student_stages"], *(given[name] for name in PARAMETERS)]
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def joined(
    variant: str, dtype: torch.dtype, chosen: str, **sizes: int
) -> tuple[dict[str, Any], Call]:
    """Arguments on the device, and the call: its loss and every gradient."""
    given = moved(arguments(variant, dtype, **SIZES | sizes))
    for leaf in (*given["student_stages"], *(given[name] for name in PARAMETERS)):
        leaf.requires_grad_()

    def call() -> tuple[Tensor, ...]:
        return gradients_of(view_aligned_attention(**given, backend=chosen), given)

    return given, call


def widened(given: dict[str, Any]) -> dict[str, Any]:
    """The same numbers as float64 leaves."""

    def wide(value: Any) -> Any:
        if isinstance(value, list):
            return [wide(item) for item in value]
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    return {name: wide(value) for name, value in given.items()}


def compare(given: dict[str, Any], ours: tuple[Tensor, ...]) -> None:
    """The law in float64 is the truth; eager is the second spelling. Floors: docs/numerics.md."""
    exact = widened(given)
    truth = gradients_of(view_aligned_attention(**exact, backend="reference"), exact)
    with torch.device("cuda"):
        plain = gradients_of(feature_loss(**given), given)
    dtype = given["patch_weight"].dtype
    for i, values in enumerate(zip(ours, plain, truth, strict=True)):
        units = 2 if i > 0 or dtype == torch.float32 else 1
        assert_within_budget(*values, f"result {i}", units * UNIT[dtype] * values[2].abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("T", [29, 133], ids=["small", "flash"])
def test_every_variant_against_float64(
    variant: str, dtype: torch.dtype, T: int, chosen: str
) -> None:
    """Three stages of 8 patches, a head of a sample on chip; of 34 patches by tiles, ragged."""
    given, call = joined(variant, dtype, chosen, T=T, J=3 if T == 29 else 4)
    compare(given, call())


@pytest.mark.parametrize("head_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("Q", [8, 43, 150])
def test_heads_of_every_size(Q: int, dtype: torch.dtype, head_size: int, chosen: str) -> None:
    shape, D = (2, 3, Q, 2 * head_size), 2 * head_size
    features = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(3 * D, D, device="cuda") * D**-0.5).to(dtype).requires_grad_()
    mask = torch.rand(2, Q, device="cuda") > 0.3
    results = []
    for backend, cast in ((chosen, dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [leaf.detach().to(cast).requires_grad_() for leaf in (features, weight)]
        y = multi_stage_attention(
            *leaves, num_heads=2, causal=True, patch_mask=mask, backend=backend
        )
        cotangent = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).to(dtype).to(cast)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, cotangent)))
    for name, *values in zip(("Y", "dX", "dWqkv"), *results, strict=True):
        floor = 2 * UNIT[dtype] * values[2].abs().max()
        assert_within_budget(*values, name, floor)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_whole_heads_and_tiles_agree(dtype: torch.dtype, chosen: str, monkeypatch) -> None:
    features = torch.randn(2, 4, 30, 128, device="cuda").to(dtype)
    weight = (torch.randn(384, 128, device="cuda") * 0.1).to(dtype)
    whole = multi_stage_attention(features, weight, num_heads=2, causal=True, backend=chosen)
    for module in (triton_attention, native_cuda):
        monkeypatch.setattr(module, "is_small", lambda *_: False)
    tiles = multi_stage_attention(features, weight, num_heads=2, causal=True, backend=chosen)
    bound = 2 * UNIT[dtype] * float(whole.abs().max())
    torch.testing.assert_close(whole, tiles, rtol=0, atol=bound)


@pytest.mark.parametrize("variant", ["conv-causal-left", "pool", "offsets-mask"])
def test_repeated_calls_give_the_same_bits(variant: str, chosen: str) -> None:
    """A race would show in one of ten."""
    _, call = joined(variant, torch.bfloat16, chosen, T=517)
    first = call()
    for _ in range(10):
        assert all(torch.equal(one, other) for one, other in zip(call(), first, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_call_waits_for_the_device(variant: str, chosen: str) -> None:
    _, call = joined(variant, torch.bfloat16, chosen)
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("variant", ["conv-causal-left", "pool", "offsets-mask"])
def test_a_captured_graph_follows_its_inputs(variant: str, chosen: str) -> None:
    given, call = joined(variant, torch.bfloat16, chosen)

    def change_inputs() -> None:
        for tensor in (*given["student_stages"], *given["teacher_stages"], given["qkv_weight"]):
            tensor.copy_(torch.randn_like(tensor) * 0.3)

    assert_a_captured_graph_follows(call, change_inputs)


def test_bad_offsets_are_mended_and_nothing_outside_is_read(chosen: str) -> None:
    given = moved(draw(torch.float32, T=9, D=32, heads=2, patchify="pool"))
    bad = torch.tensor([[-3, 4, 2, 99]] * 2, dtype=torch.int32, device="cuda")
    good = torch.tensor([[0, 4, 4, 9]] * 2, dtype=torch.int32, device="cuda")
    losses = [
        view_aligned_attention(**given, student_offsets=cuts, teacher_offsets=cuts, backend=chosen)
        for cuts in (bad, good)
    ]
    assert torch.equal(*losses)


def test_triton_is_chosen_where_it_serves() -> None:
    """A head that it declines goes to the reference: both give the same loss."""
    for heads in (2, 8):
        given = moved(draw(torch.float32, D=32, heads=heads))
        ours = view_aligned_attention(**given)
        law = view_aligned_attention(**given, backend="reference")
        torch.testing.assert_close(ours, law, rtol=4e-6, atol=0)


@pytest.mark.parametrize("kind", ["conv", "pool"])
@pytest.mark.parametrize("size", ["pat", "headline"])
def test_shapes_of_the_paper_against_float64(size: str, kind: str, chosen: str) -> None:
    """The sizes that the floors are counted for, in bfloat16."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    cases = {case.name: case for case in CATALOG["view_aligned_attention"].cases}
    given = cases[f"joined-{size}-{kind}"].make(torch.device("cuda"), torch.bfloat16, 0)
    ours = gradients_of(view_aligned_attention(**given, backend=chosen), given)
    compare(given, ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_of_chunks_against_float64(dtype: torch.dtype, chosen: str) -> None:
    """Several chunks, several blocks of columns, a normed target, masks."""
    generator = torch.Generator(device="cuda").manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    leaves = [normal(4, 130, 96), normal(1500, 96), normal(1500)]
    target, mask = normal(4, 1037, 1500), torch.rand(4, 1037, device="cuda") > 0.4
    results = []
    for backend, cast in ((chosen, dtype), ("reference", dtype), ("reference", torch.float64)):
        fresh = [leaf.to(cast).requires_grad_() for leaf in leaves]
        loss = fused_linear_mse(
            *fresh, target.to(cast), patch_size=8, target_mask=mask, target_norm=True,
            chunk_rows=128, backend=backend,
        )  # fmt: skip
        results.append((loss.detach(), *torch.autograd.grad(loss, fresh)))
    for name, *values in zip(("loss", "dy", "dU", "du"), *results, strict=True):
        floor = 4e-6 * values[2].abs() if name == "loss" else None
        assert_within_budget(*values, name, floor)
