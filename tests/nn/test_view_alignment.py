"""The joined loss: the law, masks, padding, tails."""

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import view_aligned_attention
from tests.budget import assert_within_budget
from tests.nn.alignment_spelling import draw, feature_loss
from tests.nn.alignment_stores import assert_joined_within_budget
from tests.nn.alignment_variants import (
    EMBEDDINGS,
    PARAMETERS,
    VARIANTS,
    arguments,
    cast,
    embed,
    leaves,
    run,
)

STEM = "view_aligned_attention"


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_equals_the_second_spelling(variant: str) -> None:
    given = embed(arguments(variant, torch.float64))
    ours, ours_grads = run(view_aligned_attention, given, backend="reference")
    truth, truth_grads = run(feature_loss, given)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(ours_grads, truth_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", ["conv-causal-left", "offsets-mask"])
def test_gradcheck_of_the_reference(variant: str) -> None:
    given = embed(arguments(variant, torch.float64, T=9, H=3, M=3, D=4, J=2, p=3))
    names = (*PARAMETERS, *EMBEDDINGS)

    def loss(*tensors: Tensor) -> Tensor:
        named = dict(zip(names, tensors[2:], strict=True))
        return view_aligned_attention(
            **given | {"student_stages": list(tensors[:2])} | named, backend="reference"
        )

    inputs = [leaf.requires_grad_() for leaf in leaves(given)]
    assert torch.autograd.gradcheck(loss, inputs)


DRAWS = [
    pytest.param(torch.float64, 0, id="f64"),
    pytest.param(torch.float32, 0, id="f32"),
    *(pytest.param(torch.bfloat16, seed, id=f"bf16-{seed}") for seed in range(3)),
    *(pytest.param(torch.float16, seed, id=f"f16-{seed}") for seed in range(3)),
]


@pytest.mark.parametrize(("dtype", "seed"), DRAWS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_within_budget(variant, dtype, seed, backend, poisoned_memory) -> None:
    torch.manual_seed(seed)
    assert_joined_within_budget(embed(arguments(variant, dtype)), backend)


@pytest.mark.parametrize("T", [1, 7, 8, 9, 128])
@pytest.mark.parametrize("J", [1, 4])
def test_tails_and_stages(T, J, backend, poisoned_memory) -> None:
    given = arguments("conv-causal-left", torch.float32, T=T, J=J, p=8)
    ours, ours_grads = run(view_aligned_attention, given, backend=backend)
    truth, truth_grads = run(feature_loss, cast(given, torch.float64))
    eager, eager_grads = run(feature_loss, given)
    assert_within_budget(ours, eager, truth, "loss", 4e-6 * truth.abs())
    for i, (mine, plain, law) in enumerate(zip(ours_grads, eager_grads, truth_grads, strict=True)):
        assert_within_budget(mine, plain, law, f"gradient {i}")


@pytest.mark.parametrize("patchify", ["conv", "pool"])
def test_padding_can_be_cut_off_and_its_nan_never_leaks(patchify, backend) -> None:
    given = draw(torch.float32, T=24, patchify=patchify)
    loss, grads = run(
        view_aligned_attention, given | {"attention_mask": torch.arange(24).expand(2, 24) < 12},
        backend=backend,
    )  # fmt: skip
    for side in ("student_stages", "teacher_stages"):
        for stage in given[side]:
            stage[:, 12:] = torch.nan
    dirty = run(
        view_aligned_attention, given | {"attention_mask": torch.arange(24).expand(2, 24) < 12},
        backend=backend,
    )  # fmt: skip
    short = {
        side: [s[:, :12] for s in given[side]] for side in ("student_stages", "teacher_stages")
    }
    cut = run(view_aligned_attention, given | short, backend=backend)
    assert torch.equal(loss, dirty[0])
    assert all(map(torch.equal, grads, dirty[1]))
    torch.testing.assert_close(loss, cut[0], rtol=2e-6, atol=0)
    for whole, part in zip(dirty[1][:3], cut[1][:3], strict=True):
        torch.testing.assert_close(whole[:, :12], part)
        assert not whole[:, 12:].any()
    given["student_stages"][0][0, 3] = torch.nan
    seen, _ = run(
        view_aligned_attention, given | {"attention_mask": torch.arange(24).expand(2, 24) < 12},
        backend=backend,
    )  # fmt: skip
    assert seen.isnan()


@pytest.mark.parametrize("empty", ["T", "B", "mask", "sample"])
def test_nothing_to_compare_is_zero(empty, backend, poisoned_memory) -> None:
    given = draw(torch.float32, T=0 if empty == "T" else 9, B=0 if empty == "B" else 2)
    if empty in ("mask", "sample"):
        given["attention_mask"] = torch.zeros(2, 9, dtype=torch.bool)
    if empty == "sample":
        given["attention_mask"][1] = True
    loss, grads = run(view_aligned_attention, given, backend=backend)
    assert all(grad.isfinite().all() for grad in grads)
    if empty == "sample":
        assert loss > 0
        assert not grads[0][0].any()
    else:
        assert loss == 0
        assert not any(grad.any() for grad in grads)


def test_causal_features_do_not_see_later_patches(backend) -> None:
    given = draw(torch.float64, T=12, p=4)
    for causal in (True, False):
        stage = given["student_stages"][1].clone().requires_grad_()
        stages = [given["student_stages"][0], stage, given["student_stages"][2]]
        _, features = view_aligned_attention(
            **given | {"student_stages": stages}, causal=causal, return_features=True,
            backend=backend,
        )  # fmt: skip
        for feature in features:
            (grad,) = torch.autograd.grad(feature[:, 1].sum(), stage, retain_graph=True)
            assert grad[:, :8].any()
            assert bool(grad[:, 8:].any()) is not causal


def test_features_come_with_the_same_loss(backend) -> None:
    given = arguments("pool-causal-holes", torch.float32)
    loss, grads = run(view_aligned_attention, given, backend=backend)
    other, other_grads = run(view_aligned_attention, given, return_features=True, backend=backend)
    torch.testing.assert_close(loss, other)
    for mine, theirs in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_stage_weights_upstream_and_only_wanted_gradients(backend) -> None:
    given = draw(torch.float64)
    parts = [
        run(view_aligned_attention, given, stage_weights=list(row), backend=backend)[0]
        for row in torch.eye(3).tolist()
    ]
    weighted, grads = run(view_aligned_attention, given, stage_weights=[2, 0, 0.5], backend=backend)
    torch.testing.assert_close(weighted, 2 * parts[0] + 0.5 * parts[2])
    for wanted in PARAMETERS:
        leaf = given[wanted].clone().requires_grad_()
        loss = view_aligned_attention(
            **given | {wanted: leaf}, stage_weights=[2, 0, 0.5], backend=backend
        )
        (3 * loss).backward()
        torch.testing.assert_close(leaf.grad, 3 * grads[3 + PARAMETERS.index(wanted)])


def test_strided_and_expanded_stages_and_repeats(backend) -> None:
    given = arguments("conv-holes-norm", torch.float32)
    wide = [torch.randn(2, 22, 12)[:, 1:] for _ in range(2)]
    stages = [*wide, torch.randn(1, 1, 12).expand(2, 21, 12)]
    same = run(
        view_aligned_attention, given | {"student_stages": [s.contiguous() for s in stages]},
        backend=backend,
    )  # fmt: skip
    for _ in range(3):
        loss = view_aligned_attention(**given | {"student_stages": stages}, backend=backend)
        assert torch.equal(loss, same[0])
