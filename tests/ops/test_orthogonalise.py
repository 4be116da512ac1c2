"""Newton-Schulz rounds, Muon's step: the law, torch's own spelling, shapes, edges."""

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import muon_step, orthogonalise
from deepfusion_kernels.catalog import CATALOG
from deepfusion_kernels.ops.orthogonalise.reference import QUINTIC
from tests.budget import assert_within_budget

STEM = "orthogonalise"
SHAPES = [(3, 5, 9), (2, 33, 7), (2, 17, 17), (1, 1, 1), (2, 40, 100), (4, 96, 64), (1, 31, 257)]


def stack(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
        if case.quick and case.door == "orthogonalise":
            given = case.make(torch.device("cpu"), torch.float32, 0)
            assert orthogonalise(**given, backend=backend).shape == given["matrices"].shape


STACKS = [(12, 40), (3, 40, 12), (9, 9), (2, 2, 12, 40), (0, 5, 7)]
SETTINGS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
Triple = tuple[list[Tensor], list[Tensor], list[Tensor]]


def before(*shapes: tuple[int, ...]) -> Triple:
    """Parameters, gradients and momenta."""
    one, two, three = (
        [stack(*s, seed=n + role) for n, s in enumerate(shapes)] for role in (1, 40, 80)
    )
    return one, two, three


def double(triple: Triple) -> Triple:
    one, two, three = ([tensor.double() for tensor in part] for part in triple)
    return one, two, three


def test_step_within_budget(backend, poisoned_memory) -> None:
    ours, truth, begun = before(*STACKS), double(before(*STACKS)), before(*STACKS)[0]
    for _ in range(3):
        muon_step(*ours, **SETTINGS, backend=backend)
        muon_step(*truth, **SETTINGS, backend="reference")
    for n, shape in enumerate(STACKS):
        eager = eager_steps(*(part[n] for part in before(*STACKS)), repeats=3)
        if 0 in shape:
            continue
        moved = [one.double() - begun[n].double() for one in (ours[0][n], eager[0], truth[0][n])]
        # the floor of the directions, three times over
        assert_within_budget(*moved, f"p{shape}", 3 * 2**-5 * moved[2].abs().max())
        assert_within_budget(ours[2][n], eager[1], truth[2][n], f"m{shape}")


def eager_steps(
    parameter: Tensor, gradient: Tensor, momentum: Tensor, repeats: int
) -> tuple[Tensor, Tensor]:
    """torch.optim.Muon, every matrix a parameter of its own; (parameter, momentum)."""
    shape = parameter.shape
    flat = [one.reshape(-1, *shape[-2:]) for one in (parameter, gradient, momentum)]
    for one, slope, mean in zip(*flat, strict=True):
        leaf = torch.nn.Parameter(one)
        leaf.grad = slope
        optimizer = torch.optim.Muon([leaf], **SETTINGS, adjust_lr_fn="match_rms_adamw")
        optimizer.state[leaf]["momentum_buffer"] = mean
        for _ in range(repeats):
            optimizer.step()
    return flat[0].view(shape), flat[2].view(shape)


def test_step_does_not_depend_on_its_company(backend) -> None:
    together, alone = before(*STACKS), before(*STACKS)
    muon_step(*together, **SETTINGS, backend=backend)
    for one in zip(*alone, strict=True):
        muon_step(*([tensor] for tensor in one), **SETTINGS, backend=backend)
    for part, other in zip(together, alone, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(part, other, strict=True))


def test_step_of_strided_gradients_and_of_nothing(backend) -> None:
    (parameter,), (gradient,), (momentum,) = before((3, 12, 40))
    strided = torch.empty(12, 3, 40).transpose(0, 1).copy_(gradient)
    other = parameter.clone(), gradient, momentum.clone()
    muon_step([parameter], [strided], [momentum], lr=0.01, backend=backend)
    muon_step(*([tensor] for tensor in other), lr=0.01, backend=backend)
    assert torch.equal(parameter, other[0])
    assert torch.equal(momentum, other[2])
    muon_step([], [], [], lr=0.01, backend=backend)


def test_step_moves_leaves_and_is_seen_by_autograd(backend) -> None:
    leaf = torch.nn.Parameter(stack(6, 8))
    square = (leaf * leaf).sum()
    muon_step([leaf], [stack(6, 8, seed=4)], [torch.zeros(6, 8)], lr=0.01, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gradients": []}, "gradients must be 1 tensors, one a parameter, got 0"),
        ({"momenta": [torch.ones(4, 3)]}, r"momenta must be \[3, 4\], got \[4, 3\]"),
        ({"gradients": [torch.ones(3, 4).double()]}, "gradients must have dtype float32"),
        ({"parameters": [torch.ones(4)]}, r"every parameter must be \[..., A, B\]"),
    ],
)
def test_step_refuses(change: dict[str, list[Tensor]], said: str) -> None:
    given = {name: [torch.ones(3, 4)] for name in ("parameters", "gradients", "momenta")}
    with pytest.raises(ValueError, match=f"muon_step: {said}"):
        muon_step(**given | change, lr=0.1)


def test_native_step_declines_strided_parameters() -> None:
    turned, plain = torch.ones(4, 3).t(), torch.ones(3, 4)
    with pytest.raises(NotImplementedError, match="contiguous parameters"):
        muon_step([turned], [plain], [plain.clone()], lr=0.1, backend="cpu")
