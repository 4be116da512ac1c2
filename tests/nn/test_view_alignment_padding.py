"""Conv patches of padded batches: read in place where they are whole, mended where they are not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import view_aligned_attention
from deepfusion_kernels.bench.timing import peak_extra_bytes
from deepfusion_kernels.ops.view_aligned_attention.patch_rows.native_impl import (
    is_direct,
    needed_mask,
)
from tests.conftest import why_not
from tests.nn.alignment_spelling import draw
from tests.nn.alignment_stores import assert_joined_within_budget
from tests.nn.alignment_variants import leaves, run
from tests.onlooker import Onlooker

pytestmark = pytest.mark.skipif(why_not("cpu") is not None, reason=str(why_not("cpu")))
DTYPES = [torch.float32, torch.bfloat16]
# a patch of 4 x 18 values: tokens begin within a panel of columns
SIZES = {"B": 4, "T": 23, "J": 2, "H": 18, "D": 32, "M": 24, "p": 4}


def _kept(ranges: list[tuple[int, int]], T: int) -> Tensor:
    tokens = torch.arange(T)
    return torch.stack([(tokens >= first) & (tokens < end) for first, end in ranges])


MASKS = {
    "none": None,
    "right": [(0, 23), (0, 9), (0, 8), (0, 1)],
    "left": [(0, 23), (9, 23), (8, 23), (22, 23)],
    "both": [(5, 6), (3, 19), (4, 20), (1, 22)],
    "a sample": [(0, 23), (0, 0), (0, 22), (0, 0)],
}


def _given(name: str, dtype: torch.dtype, **sizes: int) -> dict[str, Any]:
    given = draw(dtype, **SIZES | sizes)
    if MASKS[name] is not None:
        given["attention_mask"] = _kept(MASKS[name], given["student_stages"][0].shape[1])
    return given


def _is_direct(given: dict[str, Any]) -> bool:
    mask, p = needed_mask(given.get("attention_mask")), given["patch_size"]
    return is_direct(given["student_stages"], given["patch_weight"], mask, p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MASKS)
def test_padded_within_budget(name, dtype, poisoned_memory) -> None:
    given = _given(name, dtype)
    assert _is_direct(given)
    assert_joined_within_budget(given, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["right", "left", "both", "a sample"])
def test_what_is_masked_is_never_read_and_gets_no_gradient(name, dtype) -> None:
    given = _given(name, dtype)
    clean = run(view_aligned_attention, given, backend="cpu")
    masked = ~given["attention_mask"]
    for stage in given["student_stages"]:
        stage[masked] = torch.nan
    loss, grads = run(view_aligned_attention, given, backend="cpu")
    assert torch.equal(loss, clean[0])
    for mine, theirs in zip(grads, clean[1], strict=True):
        assert torch.equal(mine, theirs)
    for j in range(SIZES["J"]):
        assert not grads[j][masked].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_but_padding_is_zero(dtype, poisoned_memory) -> None:
    given = _given("none", dtype) | {"attention_mask": torch.zeros(4, 23, dtype=torch.bool)}
    loss, grads = run(view_aligned_attention, given, backend="cpu")
    assert loss == 0
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_opaque_op_and_strided_stages_change_no_bit(dtype) -> None:
    given = _given("both", dtype)
    loss, grads = run(view_aligned_attention, given, backend="cpu")
    with Onlooker():
        other, other_grads = run(view_aligned_attention, given, backend="cpu")
    longer = [torch.nn.functional.pad(s, (0, 0, 1, 0)) for s in given["student_stages"]]
    for stage in longer:
        stage.requires_grad_()
    sliced = given | {"student_stages": [stage[:, 1:] for stage in longer]}
    third = view_aligned_attention(**sliced, backend="cpu")
    dstages = torch.autograd.grad(third, longer)
    assert torch.equal(loss, other)
    assert torch.equal(loss, third.detach())
    for mine, theirs in zip(grads, other_grads, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(grads, dstages, strict=False):
        assert torch.equal(mine, theirs[:, 1:])


def test_patches_with_holes_are_packed_chunk_by_chunk() -> None:
    given = draw(torch.float32, **SIZES)
    mask = torch.arange(23).remainder(4).ne(1).expand(4, 23)
    assert not _is_direct(given | {"attention_mask": mask})


def test_padding_copies_broken_patches_alone() -> None:
    """A padded batch needs no more memory than a whole one but for two patches a sample."""

    def peak(name: str) -> int:
        given = _given(name, torch.float32, T=256, H=64, p=8)
        if name != "none":
            given["attention_mask"] = _kept([(3, 250)] * 4, 256)
        tensors = leaves(given)
        for leaf in tensors:
            leaf.requires_grad_()

        def call() -> tuple[Tensor, ...]:
            return torch.autograd.grad(view_aligned_attention(**given, backend="cpu"), tensors)

        return peak_extra_bytes(call, torch.device("cpu"))

    patch, stages = 8 * 64 * 4, SIZES["J"] * SIZES["B"]
    # a batch packed whole would be 32 patches a sample
    assert peak("right") - peak("none") < 4 * stages * patch
