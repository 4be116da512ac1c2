"""Doors of few microseconds: the plain node and the opaque op give the same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import fused_linear_mse, multi_stage_attention
from tests.conftest import why_not
from tests.onlooker import Onlooker

pytestmark = pytest.mark.skipif(why_not("cpu") is not None, reason=str(why_not("cpu")))
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _attention(dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor]]:
    valid = torch.tensor([[True] * 5, [False, True, True, False, False]])

    def call(features: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return multi_stage_attention(
            features, weight, num_heads=2, qkv_bias=bias, patch_mask=valid, causal=True, **options
        )

    shapes = [(2, 3, 5, 12), (36, 12), (36,)]
    return call, [torch.randn(shape).to(dtype) for shape in shapes]


def _mse(dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor]]:
    target, weights = torch.randn(2, 14, 10).to(dtype), torch.rand(2, 5)
    mask = torch.arange(14)[None] < torch.tensor([[14], [7]])

    def call(features: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return fused_linear_mse(
            features, weight, bias, target, row_weight=weights, patch_size=3, target_mask=mask,
            **options,
        )  # fmt: skip

    return call, [torch.randn(shape).to(dtype) for shape in [(2, 5, 8), (10, 8), (10,)]]


DOORS = {"multi_stage_attention": _attention, "fused_linear_mse": _mse}


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "bf16", "f16", "f64"))
@pytest.mark.parametrize("door", DOORS)
def test_same_bits_watched_or_not(door, dtype, poisoned_memory) -> None:
    call, leaves = DOORS[door](dtype)
    for leaf in leaves:
        leaf.requires_grad_()

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        out = call(*leaves, backend="cpu")
        return out, torch.autograd.grad(out, leaves, torch.full_like(out, 0.75))

    out, grads = run()
    with Onlooker():
        other, other_grads = run()
    assert torch.equal(out, other)
    for mine, theirs in zip(grads, other_grads, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("door", DOORS)
def test_each_gradient_by_itself(door, wanted) -> None:
    call, leaves = DOORS[door](torch.float32)
    whole = [leaf.clone().requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(call(*whole).sum(), whole)
    for index in wanted:
        leaves[index].requires_grad_()
    found = torch.autograd.grad(call(*leaves).sum(), [leaves[index] for index in wanted])
    for index, mine in zip(wanted, found, strict=True):
        assert torch.equal(mine, grads[index])


@pytest.mark.parametrize("door", DOORS)
def test_refuses_a_second_derivative(door) -> None:
    call, leaves = DOORS[door](torch.float32)
    leaf = leaves[1].requires_grad_()
    out = call(*leaves).sum()
    (grad,) = torch.autograd.grad(out, leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), leaf)


@pytest.mark.parametrize("door", DOORS)
def test_checkpointing_and_no_grad(door) -> None:
    call, leaves = DOORS[door](torch.float32)
    for leaf in leaves:
        leaf.requires_grad_()
    plain = torch.autograd.grad(call(*leaves).sum(), leaves)
    again = torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False)
    for mine, theirs in zip(torch.autograd.grad(again.sum(), leaves), plain, strict=True):
        assert torch.equal(mine, theirs)
    with torch.no_grad():
        assert not call(*leaves).requires_grad
        torch.testing.assert_close(call(*leaves), again.detach())


def test_a_table_that_is_none_is_refused_by_its_name() -> None:
    call = {"patch_size": None, "target_offsets": torch.tensor([[0, 4, 2]], dtype=torch.int32)}
    with pytest.raises(ValueError, match="target_offsets must be not decreasing"):
        fused_linear_mse(
            torch.zeros(1, 2, 4), torch.zeros(6, 4), None, torch.zeros(1, 5, 6), **call
        )


def test_attention_reads_features_of_any_strides() -> None:
    call, leaves = _attention(torch.float32)
    features = leaves[0]
    expected = call(*leaves)
    stage_major = features.transpose(0, 1).contiguous().transpose(0, 1)
    wider = torch.zeros(2, 3, 7, 12)
    wider[:, :, 1:6] = features
    for other in (stage_major, wider[:, :, 1:6], features.expand(2, 3, 5, 12)):
        assert torch.equal(call(other, *leaves[1:]), expected)
    shared = features[:, :1].expand(2, 3, 5, 12)
    assert torch.equal(call(shared, *leaves[1:]), call(shared.contiguous(), *leaves[1:]))
