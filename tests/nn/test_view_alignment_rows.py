"""What the joined loss keeps of few rows: their errors instead of dU, and what was pooled."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import view_aligned_attention
from deepfusion_kernels.bench.timing import peak_extra_bytes
from tests.conftest import why_not
from tests.nn.alignment_spelling import draw
from tests.nn.alignment_stores import assert_joined_within_budget
from tests.nn.alignment_variants import PARAMETERS, leaves, run
from tests.onlooker import Onlooker

pytestmark = pytest.mark.skipif(why_not("cpu") is not None, reason=str(why_not("cpu")))
DTYPES = [torch.float32, torch.bfloat16]
# 2 patches a sample: four rows a stage, far fewer than the heads are wide or high
FEW = {"T": 8, "p": 4, "J": 2, "D": 32, "M": 48}
# sums of three pieces; tasks enough that panels of one are packed beside the tiles of another
LONG = {"B": 5, "T": 32, "p": 4, "J": 2, "H": 48, "D": 64, "M": 2080}


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """Sizes of what is saved for backward and is no input of the call."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patchify", ["conv", "pool"])
@pytest.mark.parametrize("sizes", [FEW, LONG], ids=["few", "long"])
def test_rows_within_budget(sizes, patchify, dtype, poisoned_memory) -> None:
    assert_joined_within_budget(draw(dtype, patchify=patchify, **sizes), "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patchify", ["conv", "pool"])
def test_kept_rows_change_no_bit(patchify, dtype) -> None:
    given = draw(dtype, patchify=patchify, **FEW)
    loss, grads = run(view_aligned_attention, given, backend="cpu")
    with Onlooker():
        other, other_grads = run(view_aligned_attention, given, backend="cpu")
    assert torch.equal(loss, other)
    for i, (mine, theirs) in enumerate(zip(grads, other_grads, strict=True)):
        assert torch.equal(mine, theirs), f"gradient {i}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype) -> None:
    """Whichever thread takes a task, and whatever it had packed for another."""
    given = draw(dtype, patchify="conv", **LONG)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(view_aligned_attention, given, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for loss, grads in found[1:]:
        assert torch.equal(loss, found[0][0])
        for mine, theirs in zip(grads, found[0][1], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_backwards_and_an_upstream(dtype) -> None:
    given = draw(dtype, patchify="pool", **FEW)
    for leaf in leaves(given):
        leaf.requires_grad_()
    loss = 4 * view_aligned_attention(**given, backend="cpu")
    once = torch.autograd.grad(loss, leaves(given), retain_graph=True)
    twice = torch.autograd.grad(loss, leaves(given))
    _, plain = run(view_aligned_attention, given, backend="cpu")
    for first, second, third in zip(once, twice, plain, strict=True):
        assert torch.equal(first, second)
        # a power of two rounds nothing differently
        assert torch.equal(first, 4 * third)


@pytest.mark.parametrize("frozen", [PARAMETERS[:1], PARAMETERS[3:4], PARAMETERS[3:], PARAMETERS])
def test_frozen_parameters_leave_the_rest_as_it_was(frozen) -> None:
    given = draw(torch.float32, patchify="pool", **FEW)
    _, grads = run(view_aligned_attention, given, backend="cpu")
    wanted = [name for name in PARAMETERS if name not in frozen]
    for tensor in [*given["student_stages"], *(given[name] for name in wanted)]:
        tensor.requires_grad_()
    found = torch.autograd.grad(
        view_aligned_attention(**given, backend="cpu"),
        [*given["student_stages"], *(given[name] for name in wanted)],
    )
    rest = [g for g, name in zip(grads[2:], PARAMETERS, strict=True) if name not in frozen]
    for mine, theirs in zip(found, [*grads[:2], *rest], strict=True):
        assert torch.equal(mine, theirs)


def _saved(given: dict[str, Any]) -> int:
    inputs = sum(t.numel() * t.itemsize for t in (*given["student_stages"],))
    inputs += sum(given[name].numel() * given[name].itemsize for name in PARAMETERS[:3:2])
    with kept_bytes() as sizes:
        loss = view_aligned_attention(**given, backend="cpu")
    del loss
    return sum(sizes) - inputs


def test_gradients_of_wide_heads_exist_once() -> None:
    """Of 2 rows, a head of 256 x 2048: what is kept is far smaller than dU, 2 MiB, and the peak is
    little more than the gradients that are handed back."""
    given = draw(torch.float32, B=1, T=8, p=4, J=1, H=16, D=256, M=2048, patchify="pool")
    tensors = leaves(given)
    for leaf in tensors:
        leaf.requires_grad_()
    head = given["head_weight"].numel() * 4
    assert _saved(given) < head / 8

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(view_aligned_attention(**given, backend="cpu"), tensors)

    returned = sum(leaf.numel() * leaf.itemsize for leaf in tensors)
    assert peak_extra_bytes(call, torch.device("cpu")) < returned + head / 2


def test_many_rows_keep_the_gradient_of_the_head() -> None:
    """Of 64 rows a head of 8 x 8 is the smaller."""
    given = draw(torch.float32, B=1, T=64, p=1, J=1, H=8, D=8, M=8, patchify="pool")
    for leaf in leaves(given):
        leaf.requires_grad_()
    rows = 64 * 8 * 4
    # X, QKV, dY, pooled rows; L, delta, v, dU and the rest are less than two rows more, E and Y
    # would be two
    assert _saved(given) < 8 * rows
