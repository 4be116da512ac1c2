"""Newton-Schulz rounds: the law, torch's own spelling, shapes, edges."""

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import orthogonalise
from deepfusion_kernels.catalog import CATALOG
from deepfusion_kernels.ops.orthogonalise.reference import QUINTIC
from tests.budget import assert_within_budget

STEM = "orthogonalise"
SHAPES = [(3, 5, 9), (2, 33, 7), (2, 17, 17), (1, 1, 1), (2, 40, 100), (4, 96, 64), (1, 31, 257)]


def stack(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def as_torch_does(matrices: Tensor) -> Tensor:
    """torch.optim.Muon's rounds, matrix by matrix, in bfloat16."""
    rows = []
    for matrix in matrices:
        tall = matrix.shape[0] > matrix.shape[1]
        x = (matrix.t() if tall else matrix).bfloat16()
        x = x / x.norm().clamp(min=1e-7)
        a, b, c = QUINTIC
        for _ in range(5):
            gram = x @ x.t()
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        rows.append((x.t() if tall else x).to(matrix.dtype))
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_budget(shape, backend, poisoned_memory) -> None:
    given = stack(*shape)
    truth = orthogonalise(given.double(), backend="reference")
    ours = orthogonalise(given, backend=backend)
    # every product is rounded to bfloat16, which five rounds amplify: docs/ops/orthogonalise.md
    assert_within_budget(ours, as_torch_does(given), truth, "X", 2**-5 * truth.abs().max())


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (24, 80)], ids=str)
def test_singular_values_come_near_one(shape, backend) -> None:
    values = torch.linalg.svdvals(orthogonalise(stack(2, *shape), backend=backend))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_reference_has_the_singular_vectors_and_the_quintic_of_the_values() -> None:
    given = stack(1, 6, 10).double()
    U, values, V = torch.linalg.svd(given[0], full_matrices=False)
    values, (a, b, c) = values / values.norm(), QUINTIC
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    found = orthogonalise(given, backend="reference")[0]
    torch.testing.assert_close(found, U @ values.diag() @ V, rtol=1e-9, atol=1e-10)


def test_matrices_do_not_see_each_other_nor_their_scale(backend) -> None:
    given = stack(3, 18, 50)
    whole = orthogonalise(given, backend=backend)
    for one, alone in zip(whole, given, strict=True):
        assert torch.equal(orthogonalise(alone, backend=backend), one)
    # a power of two changes no rounding
    assert torch.equal(orthogonalise(1024 * given, backend=backend), whole)


def test_leading_axes_strides_and_empty_stacks(backend) -> None:
    given = stack(2, 3, 8, 20)
    whole = orthogonalise(given, backend=backend)
    assert whole.shape == given.shape
    flat = orthogonalise(given.flatten(0, 1), backend=backend)
    assert torch.equal(whole.flatten(0, 1), flat)
    turned = given.transpose(0, 1)
    assert torch.equal(orthogonalise(turned, backend=backend), whole.transpose(0, 1))
    assert orthogonalise(given[:0], backend=backend).shape == (0, 3, 8, 20)


def test_zeros_stay_zeros_and_repeats_are_equal_bits(backend) -> None:
    assert not orthogonalise(torch.zeros(2, 4, 6), backend=backend).any()
    given = stack(4, 30, 70)
    once = orthogonalise(given, backend=backend)
    assert all(torch.equal(orthogonalise(given, backend=backend), once) for _ in range(3))


@pytest.mark.parametrize(
    ("matrices", "said"),
    [
        (torch.ones(4), r"matrices must be \[\.\.\., A, B\]|matrices must be"),
        (torch.ones(2, 2).bfloat16(), "float32"),
    ],
)
def test_refuses(matrices: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=f"orthogonalise: .*{said}"):
        orthogonalise(matrices)


def test_native_declines_float64() -> None:
    with pytest.raises(NotImplementedError, match="float32"):
        orthogonalise(torch.ones(1, 2, 2).double(), backend="cpu")


def test_every_case_of_the_catalog_runs_within_its_shape(backend) -> None:
    for case in CATALOG[STEM].cases:
        if case.quick:
            given = case.make(torch.device("cpu"), torch.float32, 0)
            assert orthogonalise(**given, backend=backend).shape == given["matrices"].shape
