"""The fused linear loss: against a second spelling, float64, and kl_distillation on its logits."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepfusion_kernels import fused_linear_kl_distillation, kl_distillation
from tests.budget import UNIT, assert_within_budget

STEM = "fused_linear_kl"
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# one tile of everything; chunks of rows; slices of the vocabulary
CHUNKS = {"whole": 1 << 30, "rows": 128 * 8 * 61, "slices": 3000}
NAMES = ("student_hidden", "student_weight", "student_bias")


def inputs(
    T: int, V: int, dtype: torch.dtype = torch.float32, V_t: int | None = None
) -> dict[str, Any]:
    V_t = V if V_t is None else V_t
    shapes = {"student": (V, 12), "teacher": (V_t, 7)}
    arguments: dict[str, Any] = {}
    for side, (columns, D) in shapes.items():
        arguments[f"{side}_hidden"] = torch.randn(T, D)
        arguments[f"{side}_weight"] = torch.randn(columns, D) * (3 / D**0.5)
        arguments[f"{side}_bias"] = torch.randn(columns)
    arguments = {name: tensor.to(dtype) for name, tensor in arguments.items()}
    labels = torch.randint(V, (T,))
    labels[1::5] = -100
    weight = torch.rand(T) + 0.5
    weight[2::7] = 0
    return arguments | {"labels": labels, "row_weight": weight}


def run(
    arguments: dict[str, Any],
    backend: str,
    wants: tuple[str, ...] = NAMES,
    scale: float = 1.0,
    **options: Any,
) -> dict[str, Tensor]:
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in wants}
    loss = fused_linear_kl_distillation(**(arguments | leaves), backend=backend, **options)
    upstream = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape).to(loss.dtype) * scale
    if wants:
        loss.backward(upstream)
    return {"loss": loss.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def by_logits(arguments: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Logits whole in float32 or wider, then kl_distillation's reference."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in NAMES}
    both = arguments | leaves
    wide = torch.float64 if leaves["student_hidden"].dtype == torch.float64 else torch.float32
    keep = (both["labels"] != -100) & (both["row_weight"] != 0)
    student, teacher = (
        F.linear(
            both[f"{side}_hidden"].to(wide).masked_fill(~keep[:, None], 0),
            *(both[f"{side}_{part}"].to(wide) for part in ("weight", "bias")),
        )
        for side in ("student", "teacher")
    )
    rows = {name: both[name] for name in ("labels", "row_weight")}
    loss = kl_distillation(student, teacher, **rows, **options, backend="reference")
    upstream = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape).to(loss.dtype)
    loss.backward(upstream)
    return {"loss": loss.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def assert_all_within_budget(
    ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    for name, value in ours.items():
        wanted = truth[name].double()
        floor = UNIT[value.dtype] * wanted.abs().max() if wanted.numel() else 0.0
        if name == "loss":
            floor = 4e-6 * max(1.0, float(wanted.abs().max()))
        assert_within_budget(value, eager[name], wanted, name, floor)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_reference_is_the_gradient_of_its_second_spelling(divergence: str) -> None:
    arguments = inputs(5, 9, torch.float64)
    arguments["row_weight"] = arguments["row_weight"].double()
    options = {
        "divergence": divergence, "beta": 0.3, "temperature": 2.0, "kd_weight": 0.7,
        "ce_weight": 0.5, "scale_by_temperature_squared": True,
    }  # fmt: skip
    for reduction in ("mean", "sum", "none"):
        ours = run(arguments, "reference", reduction=reduction, **options)
        theirs = by_logits(arguments, reduction=reduction, **options)
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-11, atol=1e-12)

    def loss(*leaves: Tensor) -> Tensor:
        given = arguments | dict(zip(NAMES, leaves, strict=True))
        return fused_linear_kl_distillation(
            **given, **options, chunk_bytes=1, reduction="none", backend="reference"
        )

    assert torch.autograd.gradcheck(loss, [arguments[name].requires_grad_() for name in NAMES])


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_options_within_budget(
    divergence: str, chunks: str, backend: str, poisoned_memory: None
) -> None:
    """Masks, row weights, bias, D_s != D_t; every mix of terms, temperature and reduction."""
    arguments = inputs(150, 61)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    for (tau, beta, kd, ce), reduction in itertools.product(
        ((0.5, 0.1, 1.0, 0.0), (1.0, 0.5, 0.7, 0.5), (4.0, 0.9, 1.0, 1.0), (1.0, 0.5, 0.0, 1.0)),
        ("mean", "sum", "none"),
    ):
        options = {
            "divergence": divergence, "beta": beta, "temperature": tau, "kd_weight": kd,
            "ce_weight": ce, "reduction": reduction,
        }  # fmt: skip
        ours = run(arguments, backend, chunk_bytes=CHUNKS[chunks], **options)
        eager, truth = by_logits(arguments, **options), run(wide, "reference", **options)
        assert_all_within_budget(ours, eager, truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_dtypes_within_budget(
    dtype: torch.dtype, chunks: str, backend: str, poisoned_memory: None
) -> None:
    for T, V, divergence in ((1, 1, "forward_kl"), (5, 4097, "jsd"), (150, 61, "reverse_kl")):
        arguments = inputs(T, V, dtype)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
        for reduction in ("mean", "none"):
            options = {"divergence": divergence, "ce_weight": 0.3, "reduction": reduction}
            ours = run(arguments, backend, chunk_bytes=CHUNKS[chunks], **options)
            eager, truth = by_logits(arguments, **options), run(wide, "reference", **options)
            assert_all_within_budget(ours, eager, truth)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("V_t", [40, 70])
def test_truncated_vocabulary(V_t: int, chunks: str, backend: str, poisoned_memory: None) -> None:
    arguments = inputs(20, 61, V_t=V_t)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    for ce, divergence in itertools.product((0.0, 0.5), DIVERGENCES):
        options = {"divergence": divergence, "ce_weight": ce, "vocab_align": "truncate"}
        ours = run(arguments, backend, chunk_bytes=CHUNKS[chunks], **options)
        eager, truth = by_logits(arguments, **options), by_logits(wide, **options)
        assert_all_within_budget(ours, eager, truth)
        if not ce:
            assert (ours["dstudent_weight"][40:] == 0).all() or V_t == 70


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_wanted_gradients(reduction: str, backend: str) -> None:
    arguments = inputs(8, 30)
    whole = run(arguments, backend, reduction=reduction)
    for count in range(4):
        for wants in itertools.combinations(NAMES, count):
            found = run(arguments, backend, wants, reduction=reduction)
            for name, value in found.items():
                assert torch.equal(value, whole[name]), name
    assert not fused_linear_kl_distillation(**arguments, backend=backend).requires_grad


@pytest.mark.parametrize("chunks", CHUNKS)
def test_masked_rows_cannot_leak(chunks: str, backend: str, poisoned_memory: None) -> None:
    arguments = inputs(160, 61)
    masked = (arguments["labels"] == -100) | (arguments["row_weight"] == 0)
    clean = run(arguments, backend, chunk_bytes=CHUNKS[chunks], ce_weight=0.5)
    for poison in (torch.nan, torch.inf):
        for side in ("student_hidden", "teacher_hidden"):
            arguments[side] = arguments[side].masked_fill(masked[:, None], poison)
        found = run(arguments, backend, chunk_bytes=CHUNKS[chunks], ce_weight=0.5)
        for name, value in found.items():
            assert torch.equal(value, clean[name]), name
    arguments["labels"] = torch.full_like(arguments["labels"], -100)
    for name, value in run(arguments, backend, chunk_bytes=CHUNKS[chunks]).items():
        assert (value == 0).all(), name


@pytest.mark.parametrize("chunks", CHUNKS)
def test_infinite_bias_and_bad_rows_stay_where_they_are(chunks: str, backend: str) -> None:
    arguments = inputs(9, 50)
    arguments["labels"] = None
    arguments["row_weight"] = None
    arguments["student_hidden"][3] = torch.nan
    # the first slices are missing whole on both sides: inert
    arguments["student_bias"][:40] = arguments["teacher_bias"][:40] = -torch.inf
    options = {"reduction": "none", "backend": backend, "chunk_bytes": CHUNKS[chunks]}
    rows = fused_linear_kl_distillation(**arguments, **options)
    assert rows[3].isnan()
    assert rows[[0, 1, 2, 4, 5, 6, 7, 8]].isfinite().all()
    arguments["student_bias"][45] = -torch.inf
    rows = fused_linear_kl_distillation(**arguments, **options)
    assert (rows[4:] == torch.inf).all()


def test_cross_entropy_alone_needs_no_teacher(backend: str) -> None:
    arguments = inputs(300, 61)
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias", "row_weight"):
        arguments[name] = None
    for chunks in CHUNKS.values():
        ours = run(arguments, backend, scale=2.0, kd_weight=0.0, ce_weight=1.0, chunk_bytes=chunks)
        leaves = [arguments[name].double().requires_grad_() for name in NAMES]
        loss = F.cross_entropy(F.linear(*leaves), arguments["labels"])
        for value, wanted in zip(
            ours.values(), (loss, *torch.autograd.grad(loss, leaves)), strict=True
        ):
            torch.testing.assert_close(value.double(), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_two_backwards_agree_and_a_second_derivative_is_refused(chunks: str, backend: str) -> None:
    arguments = inputs(10, 61)
    arguments["student_weight"].requires_grad_()
    loss = fused_linear_kl_distillation(**arguments, backend=backend, chunk_bytes=CHUNKS[chunks])
    wanted = arguments["student_weight"]
    (first,) = torch.autograd.grad(loss, wanted, retain_graph=True)
    (again,) = torch.autograd.grad(loss, wanted, retain_graph=True)
    (third,) = torch.autograd.grad(3 * loss, wanted, create_graph=True)
    assert torch.equal(first, again)
    torch.testing.assert_close(3 * first, third.detach())
    with pytest.raises(RuntimeError):
        third.sum().backward()


def test_micro_batches_add_up(backend: str) -> None:
    arguments = inputs(12, 30) | {"labels": None, "row_weight": None}
    whole = run(arguments, backend, reduction="sum", scale=2.0)
    leaves = {name: arguments[name].clone().requires_grad_() for name in NAMES}
    for rows in (slice(0, 5), slice(5, 12)):
        part = arguments | leaves
        part |= {"student_hidden": leaves["student_hidden"][rows]}
        part |= {"teacher_hidden": arguments["teacher_hidden"][rows]}
        fused_linear_kl_distillation(**part, reduction="sum", backend=backend).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, whole[f"d{name}"], rtol=1e-5, atol=1e-5)


def test_same_inputs_give_the_same_bits(backend: str) -> None:
    arguments = inputs(150, 61)
    for chunk_bytes in CHUNKS.values():
        first = run(arguments, backend, chunk_bytes=chunk_bytes)
        for _ in range(3):
            again = run(arguments, backend, chunk_bytes=chunk_bytes)
            assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("narrow_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_accumulator_is_used_and_bounded(
    narrow_dtype: torch.dtype, dtype: torch.dtype, backend: str
) -> None:
    arguments = inputs(300, 61, dtype)
    options = {"chunk_bytes": CHUNKS["rows"], "backend": backend, "scale": 3.0}
    wide = run(arguments, **options)["dstudent_weight"]
    narrow = run(arguments, grad_weight_dtype=narrow_dtype, **options)["dstudent_weight"]
    assert narrow.dtype == dtype
    assert not torch.equal(narrow, wide)
    torch.testing.assert_close(narrow, wide, rtol=0, atol=float(wide.abs().max()) * 2**-6)


def test_shapes_at_the_edge(backend: str) -> None:
    arguments = inputs(6, 13) | {"labels": None, "row_weight": None}
    flat = run(arguments, backend, reduction="none")
    folded = {
        k: v.view(2, 3, -1) if "hidden" in k else v for k, v in arguments.items() if v is not None
    }
    found = run(folded, backend, reduction="none")
    assert found["loss"].shape == (2, 3)
    assert torch.equal(found["loss"].flatten(), flat["loss"])
    single = {k: v[0] if "hidden" in k else v for k, v in arguments.items() if v is not None}
    assert run(single, backend, reduction="none")["loss"].shape == ()
    empty = {k: v[:0] if "hidden" in k else v for k, v in arguments.items() if v is not None}
    for reduction, chunk_bytes in itertools.product(("mean", "none"), CHUNKS.values()):
        found = run(empty, backend, reduction=reduction, chunk_bytes=chunk_bytes)
        assert found["loss"].sum() == 0
        assert (found["dstudent_weight"] == 0).all()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"student_weight": torch.zeros(9, 5)}, r"student_weight must be \[V, D\] = \[V, 4\]"),
        ({"student_weight": torch.zeros(9, 4).half()}, "student_weight must have dtype float32"),
        ({"teacher_hidden": torch.zeros(2, 4)}, r"teacher_hidden must be \[..., D_t\] = \[3, 4\]"),
        ({"teacher_weight": torch.zeros(8, 4)}, "pass vocab_align='truncate'"),
        ({"teacher_weight": torch.zeros(9, 4, requires_grad=True)}, "teacher must be detached"),
        ({"teacher_weight": None}, "teacher_weight must be given when kd_weight != 0"),
        ({"student_bias": torch.zeros(3)}, "student_bias must be"),
        ({"kd_weight": 0.0}, "not both 0"),
        ({"ce_weight": 1.0}, "labels must be given"),
        ({"ce_weight": 1.0, "labels": torch.tensor([0, 9, 1])}, r"labels must be in .* = \[0, 9\)"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"chunk_bytes": 0}, "chunk_bytes must be positive"),
        ({"grad_weight_dtype": torch.int8}, "grad_weight_dtype must be one of"),
        ({"reduction": "batchmean"}, "reduction must be one of"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str, backend: str) -> None:
    arguments: dict[str, Any] = {
        "student_hidden": torch.zeros(3, 4),
        "student_weight": torch.zeros(9, 4),
        "teacher_hidden": torch.zeros(3, 4),
        "teacher_weight": torch.zeros(9, 4),
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_kl_distillation(**(arguments | change), backend=backend)
