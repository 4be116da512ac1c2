"""The joined loss: what is refused, graphs, memory; the module."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import view_aligned_attention
from deepfusion_kernels.bench.timing import peak_extra_bytes
from deepfusion_kernels.nn.alignment_node import aligned_loss
from deepfusion_kernels.nn.view_alignment import ViewAlignedAttention
from tests.conftest import why_not
from tests.nn.alignment_spelling import draw
from tests.nn.alignment_variants import (
    PARAMETERS,
    arguments,
    embed,
    run,
    tables,
)

STEM = "view_aligned_attention"

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "J": ({"teacher_stages": []}, "teacher_stages must be 3 tensors"),
    "none": ({"student_stages": [], "teacher_stages": []}, "at least one"),
    "width": ({"qkv_weight": torch.zeros(3, 3)}, "qkv_weight"),
    "dtype": ({"head_bias": torch.zeros(3, 10).double()}, "head_bias must have dtype"),
    "heads": ({"num_heads": 3}, "num_heads must be a divisor"),
    "option": ({"patchify": "both"}, "patchify"),
    "conv": (tables(2, 21), "patchify must be 'pool' with offsets"),
    "table": ({"teacher_offsets": tables(2, 21)["teacher_offsets"]}, "given with student_offsets"),
    "T'": ({"teacher_stages": [torch.zeros(2, 5, 10)] * 3}, r"teacher_stages\[0\] must be"),
    "grad": (
        {"teacher_stages": [torch.zeros(2, 21, 10, requires_grad=True)] * 3}, "without gradient"
    ),
    "weights": ({"stage_weights": [1.0]}, "stage_weights must be 3 floats"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_name(name: str) -> None:
    changes, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        view_aligned_attention(**draw(torch.float32) | changes)


@pytest.mark.parametrize("cuts", [[[0, 30]], [[5, 2]], [[-1, 3]]])
def test_bad_offsets_are_refused_on_the_cpu(cuts, backend) -> None:
    bad = torch.tensor(cuts, dtype=torch.int32).expand(2, 2)
    good = torch.tensor([[0, 3]], dtype=torch.int32).expand(2, 2)
    given = draw(torch.float32, patchify="pool")
    for sides in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match="offsets must be"):
            view_aligned_attention(
                **given, student_offsets=sides[0], teacher_offsets=sides[1], backend=backend
            )


def test_unknown_backend_and_second_derivative(backend) -> None:
    given = draw(torch.float32)
    with pytest.raises(NotImplementedError, match="no such backend"):
        view_aligned_attention(**given, backend="quack")
    leaf = given["qkv_weight"].requires_grad_()
    loss = view_aligned_attention(**given, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), leaf)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, backend) -> None:
    given = embed(arguments("conv-causal-left", torch.float32))
    eager = run(view_aligned_attention, given, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(view_aligned_attention, fullgraph=True, dynamic=dynamic)
    loss, grads = run(compiled, given, backend=backend)
    torch.testing.assert_close(loss, eager[0])
    for mine, theirs in zip(grads, eager[1], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_opcheck_of_the_joined_op(backend) -> None:
    given = arguments("offsets", torch.float32, T=9, J=2)
    stages = [stage.requires_grad_() for stage in given["student_stages"]]
    weights = [given[name].requires_grad_() for name in PARAMETERS]
    offsets = (given["student_offsets"], given["teacher_offsets"])
    inputs = (
        stages, given["teacher_stages"], *weights, None, None, *offsets, None, None, [1.0, 1.0], 2,
        0, False, True, True, True, True, backend,
    )  # fmt: skip
    torch.library.opcheck(aligned_loss, inputs)


def test_no_predictions_and_no_pooled_targets_in_memory() -> None:
    """Beyond the gradients: less than one tensor of predictions, B P M elements."""
    given = draw(torch.float32, B=8, T=256, J=2, H=16, M=2048, D=16, p=1, heads=2, patchify="pool")
    predictions = 4 * 8 * 256 * 2 * 2048
    for name in PARAMETERS:
        given[name].requires_grad_()

    def call() -> tuple[Tensor, ...]:
        loss = view_aligned_attention(**given)
        return torch.autograd.grad(loss, [given[name] for name in PARAMETERS])

    if why_not("cpu"):
        pytest.skip(str(why_not("cpu")))
    assert peak_extra_bytes(call, torch.device("cpu")) < predictions / 2


def test_module_names_counts_and_learns() -> None:
    module = ViewAlignedAttention(
        12, 10, num_stages=3, dim=16, num_heads=2, patch_size=4, position="sinusoidal",
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert set(module.state_dict()) == {*PARAMETERS, "stage_embedding"}
    count = 3 * (16 * 4 * 12 + 16) + 3 * 16 * 16 + 3 * (10 * 16 + 10) + 3 * 16
    assert sum(parameter.numel() for parameter in module.parameters()) == count
    again = ViewAlignedAttention(
        12, 10, num_stages=3, dim=16, num_heads=2, patch_size=4, position="sinusoidal",
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert all(map(torch.equal, module.parameters(), again.parameters()))

    student = [torch.randn(4, 16, 12) for _ in range(3)]
    mix = torch.randn(12, 10)
    teacher = [(stage @ mix).requires_grad_() for stage in student]
    pooled = [t.detach().unflatten(1, (4, 4)).mean(2) for t in teacher]
    constant = sum(float((goal - goal.mean((0, 1))).square().mean()) for goal in pooled)
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        loss = module(student, teacher)
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.5 * constant
    assert all(target.grad is None for target in teacher)
