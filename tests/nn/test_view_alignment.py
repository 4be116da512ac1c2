"""The joined loss: the law, masks, edges, the module."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import view_aligned_attention
from deepfusion_kernels.bench.timing import peak_extra_bytes
from deepfusion_kernels.nn.alignment_node import aligned_loss
from deepfusion_kernels.nn.view_alignment import ViewAlignedAttention
from tests.budget import UNIT, assert_within_budget
from tests.conftest import why_not
from tests.nn.alignment_spelling import draw, feature_loss

STEM = "view_aligned_attention"
PARAMETERS = ("patch_weight", "patch_bias", "qkv_weight", "head_weight", "head_bias")
EMBEDDINGS = ("patch_embedding", "stage_embedding")


def left_padding(B: int, T: int) -> Tensor:
    return torch.arange(T) >= torch.tensor([0, *[T // 2 + 1] * (B - 1)])[:, None]


def holes(B: int, T: int) -> Tensor:
    mask = torch.rand(B, T) > 0.4
    mask[0, 4:8] = False
    return mask


def tables(B: int, T: int, Q: int = 5) -> dict[str, Tensor]:
    """Random spans on both sides, empty ones and a last offset below T among them."""
    cuts = torch.randint(0, T, (2, B, Q + 1)).sort(dim=2).values.int()
    cuts[0, 0, 1] = cuts[0, 0, 2]
    return {"student_offsets": cuts[0], "teacher_offsets": cuts[1]}


VARIANTS: dict[str, dict[str, Any]] = {
    "conv": {},
    "conv-causal-left": {"causal": True, "mask": left_padding},
    "conv-holes-norm": {"mask": holes, "target_norm": True},
    "pool": {"patchify": "pool"},
    "pool-causal-holes": {"patchify": "pool", "causal": True, "mask": holes},
    "offsets": {"patchify": "pool", "tables": True, "target_norm": True},
    "offsets-mask": {"patchify": "pool", "tables": True, "mask": holes, "teacher_mask": True},
}


def arguments(variant: str, dtype: torch.dtype, **sizes: int) -> dict[str, Any]:
    options = dict(VARIANTS[variant])
    given = draw(dtype, patchify=options.pop("patchify", "conv"), **sizes)
    B, T = given["student_stages"][0].shape[:2]
    if "mask" in options:
        given["attention_mask"] = options.pop("mask")(B, T)
    if options.pop("tables", False):
        given.update(tables(B, T))
    if options.pop("teacher_mask", False):
        given["teacher_mask"] = holes(B, T).int()
    return given | options


def embed(given: dict[str, Any]) -> dict[str, Any]:
    """Adds both embeddings."""
    J, D = given["patch_bias"].shape
    T, p = given["student_stages"][0].shape[1], given["patch_size"]
    Q = given["student_offsets"].shape[1] - 1 if "student_offsets" in given else -(-T // p)
    dtype = given["patch_bias"].dtype
    return given | {
        "patch_embedding": (0.3 * torch.randn(Q, D)).to(dtype),
        "stage_embedding": (0.3 * torch.randn(J, D)).to(dtype),
    }


def leaves(given: dict[str, Any]) -> list[Tensor]:
    named = [given[name] for name in (*PARAMETERS, *EMBEDDINGS) if given.get(name) is not None]
    return [*given["student_stages"], *named]


def run(function: Any, given: dict[str, Any], **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss and the gradients of everything that has one."""
    fresh = {
        name: [t.detach().clone() for t in value] if name == "student_stages" else value
        for name, value in given.items()
    }
    for name in (*PARAMETERS, *EMBEDDINGS):
        if fresh.get(name) is not None:
            fresh[name] = fresh[name].detach().clone()
    for leaf in leaves(fresh):
        leaf.requires_grad_()
    loss = function(**fresh, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return loss.detach(), list(torch.autograd.grad(loss, leaves(fresh)))


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(item) for item in value]
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: one(value) for name, value in given.items()}


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


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ids=["f64", "f32", "bf16", "f16"],
)  # fmt: skip
@pytest.mark.parametrize("variant", VARIANTS)
def test_within_budget(variant, dtype, backend, poisoned_memory) -> None:
    given = embed(arguments(variant, dtype))
    ours, ours_grads = run(view_aligned_attention, given, backend=backend)
    eager, eager_grads = run(feature_loss, given)
    truth, truth_grads = run(
        view_aligned_attention, cast(given, torch.float64), backend="reference"
    )
    half = dtype in (torch.bfloat16, torch.float16)
    units = {torch.float64: 1e-12, torch.float32: 4e-6}.get(dtype, UNIT[dtype])
    assert_within_budget(ours, eager, truth, "loss", units * truth.abs())
    for i, (mine, plain, law) in enumerate(zip(ours_grads, eager_grads, truth_grads, strict=True)):
        # X, QKV, Y, dY, dQKV and dX are rounded one after the other: docs/ops, floors
        floor = 4 * UNIT[dtype] * law.abs().max() if half else None
        assert_within_budget(mine, plain, law, f"gradient {i}", floor)


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
        view_aligned_attention(**given, backend="triton")
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
    given = draw(torch.float32, B=4, T=256, J=2, H=16, M=2048, D=16, p=1, heads=2, patchify="pool")
    predictions = 4 * 4 * 256 * 2 * 2048
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
