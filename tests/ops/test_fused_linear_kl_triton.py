"""The fused linear loss in Triton: the case table of the CPU's in the interpreter's sizes."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepfusion_kernels import fused_linear_kl_distillation, kl_distillation
from tests.ops.test_fused_linear_kl import (
    DIVERGENCES,
    NAMES,
    assert_all_within_budget,
    by_logits,
    inputs,
    run,
)

STEM = "fused_linear_kl"
BACKENDS = ("triton",)
V = 61
# bytes of two padded float32 rows of logits
ROW = 2 * 64 * 4
# one tile of everything; chunks of rows, gradients in forward; slices of the vocabulary
CHUNKS = {"whole": 1 << 30, "rows": 128 * ROW, "slices": 1500}
ROWS = {"whole": 7, "rows": 131, "slices": 19}
pytestmark = pytest.mark.usefixtures("on_device")


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if value is not None and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def eager(arguments: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Float32 logits whose gradient enters the GEMMs in the inputs' dtype, as autograd's does."""
    if arguments["student_hidden"].dtype != torch.bfloat16:
        return by_logits(arguments, **options)
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in NAMES}
    both, rows = arguments | leaves, ("labels", "row_weight")
    keep = (both["labels"] != -100) & (both["row_weight"] != 0)
    student, teacher = (
        F.linear(
            both[f"{side}_hidden"].float().masked_fill(~keep[:, None], 0),
            *(both[f"{side}_{part}"].float() for part in ("weight", "bias")),
        )
        for side in ("student", "teacher")
    )
    student.register_hook(lambda gradient: gradient.bfloat16().float())
    options |= {name: both[name] for name in rows}
    loss = kl_distillation(student, teacher, **options, backend="reference")
    loss.backward(torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape))
    return {"loss": loss.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def check(arguments: dict[str, Any], backend: str, chunk_bytes: int, **options: Any) -> None:
    ours = run(arguments, backend, chunk_bytes=chunk_bytes, **options)
    truth = by_logits(wide(arguments), **options)
    assert_all_within_budget(ours, eager(arguments, **options), truth)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_options_within_budget(
    divergence: str, chunks: str, backend: str, poisoned_memory: None
) -> None:
    """Masks, row weights, bias, D_s != D_t; every mix of terms; reductions in turn."""
    arguments = inputs(ROWS[chunks], V)
    mixes = ((0.5, 0.1, 1.0, 0.0), (1.0, 0.5, 0.7, 0.5), (4.0, 0.9, 1.0, 1.0), (1.0, 0.5, 0.0, 1.0))
    reductions = ("mean", "none", "sum", "none")
    for (tau, beta, kd, ce), reduction in zip(mixes, reductions, strict=True):
        if chunks == "rows" and reduction == "none":
            continue
        check(
            arguments, backend, CHUNKS[chunks], divergence=divergence, beta=beta, temperature=tau,
            kd_weight=kd, ce_weight=ce, reduction=reduction,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_dtypes_within_budget(
    dtype: torch.dtype, chunks: str, backend: str, poisoned_memory: None
) -> None:
    for divergence, reduction in zip(DIVERGENCES, ("mean", "none", "sum"), strict=True):
        options = {"divergence": divergence, "ce_weight": 0.3, "reduction": reduction}
        check(inputs(ROWS[chunks], V, dtype), backend, CHUNKS[chunks], **options)


def test_long_rows_in_their_own_memory(backend: str, poisoned_memory: None) -> None:
    """bfloat16 dS of one block lands on float32 logits of the block before."""
    for columns, divergence in ((4097, "forward_kl"), (8200, "forward_kl"), (4100, "jsd")):
        arguments = inputs(3, columns, torch.bfloat16) | {"labels": None, "row_weight": None}
        check_without_labels(arguments, backend, divergence)


def check_without_labels(arguments: dict[str, Any], backend: str, divergence: str) -> None:
    T = arguments["student_hidden"].shape[0]
    given = arguments | {"labels": torch.zeros(T, dtype=torch.int64), "row_weight": torch.ones(T)}
    check(given, backend, 1 << 30, divergence=divergence, reduction="mean")


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("V_t", [40, 70])
def test_truncated_vocabulary(V_t: int, chunks: str, backend: str, poisoned_memory: None) -> None:
    arguments = inputs(9, V, V_t=V_t)
    for ce, divergence in ((0.0, "forward_kl"), (0.5, "jsd")):
        options = {"divergence": divergence, "ce_weight": ce, "vocab_align": "truncate"}
        check(arguments, backend, CHUNKS[chunks], **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_wanted_gradients(reduction: str, backend: str) -> None:
    """A frozen head, frozen hidden states, no bias: the others keep their bits."""
    arguments = inputs(6, 30)
    whole = run(arguments, backend, reduction=reduction)
    for count in range(4):
        for wants in itertools.combinations(NAMES, count):
            found = run(arguments, backend, wants, reduction=reduction)
            for name, value in found.items():
                assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("chunks", CHUNKS)
def test_masked_rows_cannot_leak(chunks: str, backend: str, poisoned_memory: None) -> None:
    arguments = inputs(ROWS[chunks], V)
    masked = (arguments["labels"] == -100) | (arguments["row_weight"] == 0)
    clean = run(arguments, backend, chunk_bytes=CHUNKS[chunks], ce_weight=0.5)
    for side, poison in (("student_hidden", torch.nan), ("teacher_hidden", torch.inf)):
        arguments[side] = arguments[side].masked_fill(masked[:, None], poison)
    found = run(arguments, backend, chunk_bytes=CHUNKS[chunks], ce_weight=0.5)
    for name, value in found.items():
        assert torch.equal(value, clean[name]), name
    arguments["labels"] = torch.full_like(arguments["labels"], -100)
    for name, value in run(arguments, backend, chunk_bytes=CHUNKS[chunks]).items():
        assert (value == 0).all(), name


@pytest.mark.parametrize("chunks", CHUNKS)
def test_infinite_bias_and_bad_rows_stay_where_they_are(chunks: str, backend: str) -> None:
    arguments = inputs(9, V) | {"labels": None, "row_weight": None}
    arguments["student_hidden"][3] = torch.nan
    # the first slices are missing whole on both sides: inert
    arguments["student_bias"][:40] = arguments["teacher_bias"][:40] = -torch.inf
    options = {"reduction": "none", "backend": backend, "chunk_bytes": CHUNKS[chunks]}
    rows = fused_linear_kl_distillation(**arguments, **options)
    assert rows.isnan().nonzero().flatten().tolist() == [3]
    arguments["student_bias"][45] = -torch.inf
    rows = fused_linear_kl_distillation(**arguments, **options)
    assert (rows[4:] == torch.inf).all()


@pytest.mark.parametrize("chunks", CHUNKS)
def test_two_backwards_agree_and_a_second_derivative_is_refused(chunks: str, backend: str) -> None:
    arguments = inputs(ROWS[chunks], V)
    wanted = arguments["student_weight"].requires_grad_()
    loss = fused_linear_kl_distillation(**arguments, backend=backend, chunk_bytes=CHUNKS[chunks])
    first, again = (torch.autograd.grad(loss, wanted, retain_graph=True)[0] for _ in range(2))
    (third,) = torch.autograd.grad(3 * loss, wanted, create_graph=True)
    assert torch.equal(first, again)
    torch.testing.assert_close(3 * first, third.detach())
    with pytest.raises(RuntimeError):
        third.sum().backward()


@pytest.mark.parametrize("narrow_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_accumulator_is_used_and_bounded(narrow_dtype: torch.dtype, backend: str) -> None:
    arguments = inputs(ROWS["rows"], V, torch.bfloat16)
    options: dict[str, Any] = {"chunk_bytes": CHUNKS["rows"], "backend": backend, "scale": 3.0}
    whole = run(arguments, **options)["dstudent_weight"]
    narrow = run(arguments, grad_weight_dtype=narrow_dtype, **options)["dstudent_weight"]
    assert not torch.equal(narrow, whole)
    torch.testing.assert_close(narrow, whole, rtol=0, atol=float(whole.abs().max()) * 2**-6)


def test_near_teacher_keeps_its_gradient(backend: str) -> None:
    """Logits of spread 10 in float32 tiles: bfloat16 ones would cost a tenth of dhidden."""
    D, T = 16, 6
    weight = (torch.randn(300, D) * (10 / D**0.5)).bfloat16()
    hidden = torch.randn(T, D).bfloat16()
    near = (hidden.float() + 0.02 * torch.randn(T, D)).bfloat16()

    def dhidden(dtype: torch.dtype, backend: str) -> Tensor:
        leaf = hidden.to(dtype).requires_grad_()
        sides = (leaf, weight.to(dtype), near.to(dtype), weight.to(dtype))
        fused_linear_kl_distillation(*sides, backend=backend).backward()
        assert leaf.grad is not None
        return leaf.grad.double()

    truth = dhidden(torch.float64, "reference")
    plain = dhidden(torch.float32, "reference").bfloat16().double()
    ours = dhidden(torch.bfloat16, backend)
    assert (ours - truth).norm() <= 2 * (plain - truth).norm()


def test_empty_and_single_rows(backend: str) -> None:
    arguments = inputs(4, 13) | {"labels": None, "row_weight": None}
    flat = run(arguments, backend, reduction="none")
    single = {k: v[0] if "hidden" in k else v for k, v in arguments.items() if v is not None}
    found = run(single, backend, reduction="none")
    torch.testing.assert_close(found["loss"], flat["loss"][0])
    empty = {k: v[:0] if "hidden" in k else v for k, v in arguments.items() if v is not None}
    for reduction, chunk_bytes in itertools.product(("mean", "none"), CHUNKS.values()):
        found = run(empty, backend, reduction=reduction, chunk_bytes=chunk_bytes)
        assert found["loss"].sum() == 0
        assert (found["dstudent_weight"] == 0).all()


def test_float64_is_refused(backend: str) -> None:
    for names in (("student_hidden", "student_weight"), ("teacher_hidden", "teacher_weight")):
        arguments = inputs(2, 5) | {"student_bias": None, "teacher_bias": None}
        arguments |= {name: arguments[name].double() for name in names}
        with pytest.raises(NotImplementedError, match=r"triton: .* got float64"):
            fused_linear_kl_distillation(**arguments, backend=backend)
