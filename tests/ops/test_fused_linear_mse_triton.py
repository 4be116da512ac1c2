"""The loss without predictions in Triton: the CPU's case table in the interpreter's sizes."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import fused_linear_mse
from deepfusion_kernels.ops.fused_linear_mse import triton_impl
from tests.budget import assert_within_budget

STEM = "fused_linear_mse"
BACKENDS = ("triton",)
LEAVES = ("features", "weight", "bias")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("on_device", "poisoned_memory")


def inputs(dtype: torch.dtype, B: int = 2, Q: int = 3, L: int = 10, M: int = 21) -> dict[str, Any]:
    shapes = {"features": (B, Q, 6), "weight": (M, 6), "bias": (M,)}
    given: dict[str, Any] = {k: torch.randn(v).to(dtype) for k, v in shapes.items()}
    mask = torch.rand(B, L) > 0.4
    mask[:1, :4] = False
    return given | {"target": torch.randn(B, L, M).to(dtype), "patch_size": 4, "target_mask": mask}


def run(given: dict[str, Any], backend: str, **options: Any) -> list[Tensor]:
    """The loss and its gradients under an upstream that is not 1."""
    leaves = [given[name].detach().clone().requires_grad_() for name in LEAVES]
    both = given | dict(zip(LEAVES, leaves, strict=True)) | options
    loss = fused_linear_mse(**both, backend=backend)
    upstream = torch.linspace(0.5, 2, loss.numel()).view_as(loss).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def wide(given: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in given.items()
    }


def check(given: dict[str, Any], backend: str, **options: Any) -> None:
    """Eager is the reference's own formula with its results rounded to the inputs' dtype."""
    ours, truth = run(given, backend, **options), run(wide(given), "reference", **options)
    plain = run(given, "reference", **options)
    for name, *values in zip(("loss", *LEAVES), ours, plain, truth, strict=True):
        mine, eager, law = (value.flatten() for value in values)
        floor = 4e-6 * law.abs() if name == "loss" else None
        assert_within_budget(mine, eager, law, name, floor)


@pytest.mark.parametrize("target_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget(dtype: torch.dtype, target_norm: bool, backend: str, monkeypatch) -> None:
    """Ragged patches, a mask, a patch without tokens, several blocks of columns, chunks."""
    monkeypatch.setattr(triton_impl, "BLOCK_M", 16)
    for reduction in ("mean", "none"):
        options = {"target_norm": target_norm, "reduction": reduction}
        check(inputs(dtype), backend, **options, chunk_rows=4)


def test_offsets_row_weights_and_sum(backend: str) -> None:
    given = inputs(torch.float32) | {"patch_size": None}
    given["target_offsets"] = torch.tensor([[0, 0, 3, 9], [1, 4, 4, 10]], dtype=torch.int32)
    weight = torch.rand(2, 3)
    weight[1, 2] = 0
    check(given, backend, row_weight=weight, reduction="sum")
    plain = {name: given[name] for name in LEAVES}
    rows = {"target": torch.randn(3, 2, 21)[..., ::1].transpose(0, 1)}
    check(plain | rows, backend, row_weight=weight)
    check(plain | {"target": torch.randn(2, 3, 42)[..., ::2]}, backend)


def test_chunks_do_not_change_a_row(backend: str) -> None:
    given = inputs(torch.float32) | {"target_mask": None}
    whole = fused_linear_mse(**given, reduction="none", backend=backend)
    for chunk_rows in (1, 4):
        rows = fused_linear_mse(**given, reduction="none", chunk_rows=chunk_rows, backend=backend)
        torch.testing.assert_close(rows, whole, rtol=4e-6, atol=0)


def test_equal_prediction_and_target_is_zero(backend: str) -> None:
    given = inputs(torch.float32, B=1, Q=6, L=6, M=7) | {"patch_size": 1, "target_mask": None}
    given["features"] = torch.eye(6)[None]
    given["target"] = (given["weight"].t() + given["bias"])[None]
    assert not any(value.any() for value in run(given, backend))


def test_masked_and_weightless_rows_are_never_read(backend: str) -> None:
    given = inputs(torch.float32)
    clean = run(given, backend)
    given["target"][~given["target_mask"]] = torch.nan
    assert all(map(torch.equal, run(given, backend), clean))
    weight = torch.ones(2, 3)
    weight[1, 1] = 0
    alone = run(given, backend, row_weight=weight)
    given["target"][1, 4:8] = torch.nan
    assert all(map(torch.equal, run(given, backend, row_weight=weight), alone))
    nothing = run(given, backend, row_weight=torch.zeros(2, 3))
    assert not any(value.any() for value in nothing)
    assert run(given | {"target_mask": None}, backend)[0].isnan()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_only_wanted_gradients_and_repeats(dtype: torch.dtype, backend: str) -> None:
    given = inputs(dtype)
    whole = run(given, backend, chunk_rows=4)
    assert all(map(torch.equal, run(given, backend, chunk_rows=4), whole))
    for wants in itertools.product((False, True), repeat=3):
        leaves = [
            given[name].clone().requires_grad_(want)
            for name, want in zip(LEAVES, wants, strict=True)
        ]
        both = given | dict(zip(LEAVES, leaves, strict=True))
        loss = fused_linear_mse(**both, chunk_rows=4, backend=backend)
        assert torch.equal(loss, whole[0])
        if not any(wants):
            assert not loss.requires_grad
            continue
        (0.5 * loss).backward(torch.ones_like(loss))
        for leaf, want, gradient in zip(leaves, wants, whole[1:], strict=True):
            assert (leaf.grad is not None) == want
            assert not want or torch.equal(leaf.grad, gradient)


def test_no_rows_no_bias_and_a_second_derivative(backend: str) -> None:
    given = inputs(torch.float32, B=0)
    loss, *grads = run(given, backend)
    assert loss == 0
    assert not any(grad.any() for grad in grads)
    given = inputs(torch.float32)
    leaf = given["features"].requires_grad_()
    loss = fused_linear_mse(**given | {"bias": None, "features": leaf}, backend=backend)
    zero = fused_linear_mse(**given | {"bias": torch.zeros(21)}, backend=backend)
    assert torch.equal(loss, zero)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), leaf)


def test_chunks_are_equal_and_fit_the_cache() -> None:
    for rows, width, itemsize in ((2048, 2048, 2), (16384, 2048, 2), (2048, 4096, 4), (5, 7, 2)):
        chunk = triton_impl.rows_per_chunk(rows, width, itemsize)
        held = chunk * width * (4 + (itemsize if itemsize < 4 else 0))
        assert held <= triton_impl.CHUNK_BYTES or chunk == triton_impl.LEAST_ROWS
    assert triton_impl.rows_per_chunk(2048, 2048, 2) == 1024


def test_declined_with_the_reason(backend: str) -> None:
    with pytest.raises(NotImplementedError, match="got float64"):
        fused_linear_mse(**wide(inputs(torch.float32)), backend=backend)


def test_opcheck(backend: str) -> None:
    given = inputs(torch.float32)
    leaves = [given[name].requires_grad_() for name in LEAVES]
    leaves[0] = leaves[0].detach().reshape(6, 6).requires_grad_()
    offsets = torch.tensor([[0, 4, 8, 10]] * 2, dtype=torch.int32)
    common = (*leaves, given["target"], offsets, given["target_mask"], None)
    options = (True, 4)
    total, rows = (getattr(torch.ops.deepfusion, f"fused_linear_mse{end}") for end in ("", "_rows"))
    torch.library.opcheck(total, (*common, True, *options, True, True, True, backend))
    torch.library.opcheck(rows, (*common, *options, backend))
