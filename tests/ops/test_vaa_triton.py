"""View-aligned attention in Triton: the CPU's case table in the interpreter's sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import multi_stage_attention, view_aligned_attention
from deepfusion_kernels.nn.alignment_node import aligned_loss
from deepfusion_kernels.ops.view_aligned_attention import triton_attention, triton_projection
from deepfusion_kernels.ops.view_aligned_attention.projection import project_patches
from tests.budget import UNIT, assert_within_budget
from tests.nn.alignment_spelling import attention, draw, feature_loss
from tests.nn.alignment_variants import PARAMETERS, VARIANTS, arguments, cast, embed, run

STEM = "view_aligned_attention"
BACKENDS = ("triton",)
HALF = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("on_device", "poisoned_memory")


def small(variant: str, dtype: torch.dtype, **sizes: int) -> dict[str, Any]:
    """Two samples, three stages, a ragged last patch, one head of 16 channels."""
    return embed(arguments(variant, dtype, **{"T": 13, "heads": 1} | sizes))


def check(given: dict[str, Any], backend: str, **options: Any) -> None:
    """Loss and every gradient; floors as in test_view_alignment.py."""
    ours, ours_grads = run(view_aligned_attention, given, backend=backend, **options)
    eager, eager_grads = run(feature_loss, given, **options)
    truth, truth_grads = run(
        view_aligned_attention, cast(given, torch.float64), backend="reference", **options
    )
    dtype = given["patch_weight"].dtype
    unit = UNIT[dtype] if dtype in HALF else 4e-6
    assert_within_budget(ours, eager, truth, "loss", unit * truth.abs())
    for i, (mine, plain, law) in enumerate(zip(ours_grads, eager_grads, truth_grads, strict=True)):
        floor = 2 * UNIT[dtype] * law.abs().max() if dtype in HALF else None
        assert_within_budget(mine, plain, law, f"gradient {i}", floor)


@pytest.mark.parametrize("variant", VARIANTS)
def test_joined_loss_within_budget(variant: str, backend: str) -> None:
    check(small(variant, torch.float32), backend)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("variant", ["conv-causal-left", "pool-causal-holes", "offsets-mask"])
def test_joined_loss_in_half_precision(variant: str, dtype: torch.dtype, backend: str) -> None:
    check(small(variant, dtype), backend)


@pytest.mark.parametrize("J, T, p", [(1, 1, 8), (1, 9, 8), (4, 8, 8), (4, 7, 3)])
def test_tails_and_stages(J: int, T: int, p: int, backend: str) -> None:
    for variant in ("conv-causal-left", "pool"):
        check(small(variant, torch.float32, J=J, T=T, p=p), backend)


@pytest.mark.parametrize("patchify", ["conv", "pool"])
def test_full_tiles_where_there_are_many(patchify: str, backend: str, monkeypatch) -> None:
    """The tiles of large calls, which these sizes would not choose."""
    monkeypatch.setattr(triton_projection, "ENOUGH_TILES", 0)
    given = small("conv-holes-norm", torch.bfloat16, H=20, T=9)
    if patchify == "pool":
        given = small("pool-causal-holes", torch.bfloat16, H=20, T=9)
    check(given, backend)
    check(given | {"patch_embedding": None}, backend)


def test_right_padding_and_a_masked_sample(backend: str) -> None:
    """Nothing masked is read, nothing of it comes back; right padding can be cut off."""
    given = draw(torch.float32, T=12, heads=1)
    given["attention_mask"] = (torch.arange(12) < torch.tensor([8, 0])[:, None]).int()
    loss, grads = run(view_aligned_attention, given, backend=backend)
    for side in ("student_stages", "teacher_stages"):
        for stage in given[side]:
            stage[0, 8:], stage[1] = torch.nan, torch.nan
    dirty, dirty_grads = run(view_aligned_attention, given, backend=backend)
    assert torch.equal(loss, dirty)
    assert all(map(torch.equal, grads, dirty_grads))
    assert not any(grad[1].any() or grad[0, 8:].any() for grad in grads[:3])
    names = ("student_stages", "teacher_stages")
    cut = {name: [stage[:1, :8] for stage in given[name]] for name in names}
    short, _ = run(view_aligned_attention, given | cut | {"attention_mask": None}, backend=backend)
    torch.testing.assert_close(loss, short, rtol=2e-6, atol=0)
    given["student_stages"][0][0, 3] = torch.nan
    assert run(view_aligned_attention, given, backend=backend)[0].isnan()


@pytest.mark.parametrize("empty", ["T", "B", "mask"])
def test_nothing_to_compare_is_zero(empty: str, backend: str) -> None:
    given = draw(torch.float32, T=0 if empty == "T" else 5, B=0 if empty == "B" else 2, heads=1)
    if empty == "mask":
        given["attention_mask"] = torch.zeros(2, 5, dtype=torch.bool)
    loss, grads = run(view_aligned_attention, given, backend=backend)
    assert loss == 0
    assert not any(grad.any() for grad in grads)


def test_tokens_outside_every_segment_get_zero(backend: str) -> None:
    given = draw(torch.float32, T=9, heads=1, patchify="pool")
    cuts = torch.tensor([[2, 4, 4, 7], [0, 0, 0, 0]], dtype=torch.int32)
    tables = {"student_offsets": cuts, "teacher_offsets": cuts}
    _, grads = run(view_aligned_attention, given | tables, backend=backend)
    for grad in grads[:3]:
        assert grad[0, 2:7].any(1).all()
        assert not torch.cat([grad[0, :2], grad[0, 7:], grad[1]]).any()


def test_strided_and_expanded_stages_and_repeats(backend: str) -> None:
    given = small("conv-holes-norm", torch.float32)
    stages = [torch.randn(2, 14, 12)[:, 1:], torch.randn(2, 13, 24)[..., :12]]
    stages.append(torch.randn(1, 1, 12).expand(2, 13, 12))
    dense = given | {"student_stages": [stage.contiguous() for stage in stages]}
    loss, grads = run(view_aligned_attention, dense, backend=backend)
    leaves = [given[name].requires_grad_() for name in PARAMETERS]
    for _ in range(3):
        again = view_aligned_attention(**given | {"student_stages": stages}, backend=backend)
        assert torch.equal(again, loss)
        assert all(map(torch.equal, torch.autograd.grad(again, leaves), grads[3:8]))


@pytest.mark.parametrize("patch_size", [0, 3])
def test_only_wanted_gradients(patch_size: int, backend: str) -> None:
    """Each alone, and the rest without some, equal the whole; of the stages, too."""
    stages = [torch.randn(2, 7, 5) for _ in range(3)]
    weight, bias = torch.randn(3, 16, 5 * max(patch_size, 1)), torch.randn(3, 16)
    offsets = torch.tensor([[0, 3, 6, 7]] * 2, dtype=torch.int32)
    names = ("patch", "stage")
    embeddings = dict(zip(names, (torch.randn(3, 16), torch.randn(3, 16)), strict=True))
    tensors = [*stages, weight, bias, *embeddings.values()]

    def gradients(wanted: set[int]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        x = project_patches(
            leaves[:3], leaves[3], leaves[4], offsets, None, leaves[5], leaves[6], patch_size,
            backend,
        )  # fmt: skip
        x.backward(torch.linspace(-1, 1, x.numel()).view_as(x))
        return [leaf.grad for leaf in leaves]

    every = set(range(len(tensors)))
    whole = gradients(every)
    for wanted in (*({i} for i in every), {0, 2}, every - {0, 3}, every - {4}):
        for i, gradient in enumerate(gradients(wanted)):
            assert (gradient is None) == (i not in wanted)
            assert gradient is None or torch.equal(gradient, whole[i])


def attend(given: dict[str, Any], backend: str) -> list[Tensor]:
    """Y and its gradients by the door, or by the second spelling."""
    leaves = [given[name].detach().clone().requires_grad_() for name in ("features", "qkv_weight")]
    if backend == "eager":
        B, _, Q, _ = given["features"].shape
        valid = given.get("patch_mask", torch.ones(B, Q, dtype=torch.bool))
        y = attention(*leaves, given["num_heads"], given.get("causal", False), valid)
    else:
        y = multi_stage_attention(*leaves, **dict(list(given.items())[2:]), backend=backend)
    cotangent = torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


def problem(dtype: torch.dtype, B: int, S: int, Q: int, E: int, heads: int) -> dict[str, Any]:
    D = E * heads
    features, weight = torch.randn(B, S, Q, D), torch.randn(3 * D, D) * D**-0.5
    mask = torch.rand(B, Q) > 0.3
    mask[-1], mask[0, 0] = False, True
    given = {"features": features.to(dtype), "qkv_weight": weight.to(dtype), "num_heads": heads}
    return given | {"patch_mask": mask}


def assert_attention(shape: tuple[Any, ...], backend: str) -> None:
    """Forward and every gradient within budget; a last sample that sees nothing is 0."""
    *sizes, causal = shape
    given = problem(*sizes) | {"causal": causal}
    ours, plain = attend(given, backend), attend(given, "eager")
    truth = attend(cast(given, torch.float64), "reference")
    dtype = given["features"].dtype
    for name, *values in zip(("Y", "dX", "dWqkv"), ours, plain, truth, strict=True):
        floor = 1.5 * UNIT[dtype] * values[2].abs().max() if dtype in HALF else None
        assert_within_budget(*values, name, floor)
    assert not ours[0][-1].any() or len(ours[0]) == 1


SHAPES = {
    "P32": (torch.float32, 2, 4, 8, 16, 2, False),
    "P33": (torch.float32, 2, 3, 11, 16, 2, True),
    "P127": (torch.bfloat16, 1, 1, 127, 16, 1, True),
    "P128": (torch.float16, 2, 4, 32, 16, 1, True),
    "P129": (torch.bfloat16, 2, 3, 43, 16, 1, True),
    "heads of 32": (torch.float32, 1, 1, 35, 32, 1, False),
    "heads of 64": (torch.bfloat16, 1, 2, 66, 64, 1, False),
    "heads of 128": (torch.bfloat16, 1, 2, 5, 128, 1, True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_within_budget(shape: str, backend: str) -> None:
    """Both kernels, causal or not, a sample that sees nothing, every size of a head."""
    assert_attention(SHAPES[shape], backend)


def test_whole_heads_and_tiles_agree(backend: str, monkeypatch) -> None:
    given = problem(torch.float32, 2, 3, 7, 16, 2) | {
        "causal": True, "qkv_bias": torch.randn(96), "scale": 0.7,
    }  # fmt: skip
    whole = attend(given, backend)
    monkeypatch.setattr(triton_attention, "is_small", lambda *_: False)
    for mine, other in zip(whole, attend(given, backend), strict=True):
        bound = 2 * UNIT[torch.float32] * float(mine.abs().max())
        torch.testing.assert_close(mine, other, rtol=0, atol=bound)


def test_declined_with_the_reason(backend: str) -> None:
    given = draw(torch.float64, T=4, heads=1)
    with pytest.raises(NotImplementedError, match="got float64"):
        view_aligned_attention(**given, backend=backend)
    with pytest.raises(NotImplementedError, match=r"D / num_heads = 8"):
        view_aligned_attention(**draw(torch.float32, T=4, heads=2), backend=backend)
    with pytest.raises(NotImplementedError, match="at most 8 stages"):
        view_aligned_attention(**draw(torch.float32, T=4, J=9, heads=1), backend=backend)
    x, weight = torch.zeros(1, 1, 2, 24), torch.zeros(72, 24)
    with pytest.raises(NotImplementedError, match=r"D / num_heads = 24"):
        multi_stage_attention(x, weight, num_heads=1, backend=backend)


def test_opcheck(backend: str) -> None:
    given = arguments("offsets", torch.float32, T=5, J=2, heads=1)
    stages = [stage.requires_grad_() for stage in given["student_stages"]]
    weights = [given[name].requires_grad_() for name in PARAMETERS]
    offsets = (given["student_offsets"], given["teacher_offsets"])
    inputs = (
        stages, given["teacher_stages"], *weights, None, None, *offsets, None, None, [1.0, 1.0], 1,
        0, False, True, True, True, True, backend,
    )  # fmt: skip
    torch.library.opcheck(aligned_loss, inputs)
    x, weight = torch.randn(2, 1, 3, 16, requires_grad=True), given["qkv_weight"]
    valid = torch.rand(1, 3) > 0.3
    torch.library.opcheck(
        torch.ops.deepfusion.multi_stage_attention,
        (x, weight, None, valid, 1, True, 0.5, backend),
    )
    torch.library.opcheck(
        torch.ops.deepfusion.patch_projection,
        (stages, *weights[:2], offsets[0], None, None, None, 0, backend),
    )
