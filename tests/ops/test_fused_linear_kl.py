"""The fused linear loss: against a second spelling, float64, and kl_distillation on its logits."""

import itertools

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import fused_linear_kl_distillation
from tests.ops.fused_linear_kl_inputs import (
    CHUNKS,
    DIVERGENCES,
    NAMES,
    assert_all_within_budget,
    by_logits,
    inputs,
    run,
)

STEM = "fused_linear_kl"


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_near_teacher_is_as_exact_as_float32(
    divergence: str, dtype: torch.dtype, backend: str
) -> None:
    """Logits of spread 10, the teacher 0.1 away: all of it in float32 is at most twice better."""
    T, V, D = 64, 1000, 64
    weight = torch.randn(V, D) * (10 / D**0.5)
    hidden = torch.randn(T, D)
    arguments = {
        "student_hidden": hidden, "student_weight": weight, "student_bias": torch.zeros(V),
        "teacher_hidden": hidden, "teacher_bias": torch.zeros(V),
        "teacher_weight": weight + torch.randn(V, D) * (0.1 / D**0.5),
    }  # fmt: skip
    rows = {"labels": torch.randint(V, (T,)), "row_weight": torch.ones(T)}
    arguments = {name: tensor.to(dtype) for name, tensor in arguments.items()}
    found = []
    for wide in (torch.float64, torch.float32):
        widened = {name: tensor.to(wide) for name, tensor in arguments.items()}
        found.append(by_logits(widened | rows, divergence=divergence)["dstudent_hidden"])
    truth, all_float32 = found[0], found[1].to(dtype).double()
    allowed = 2 * (all_float32 - truth).norm()
    for chunk_bytes in (1 << 30, 100_000):
        ours = run(arguments | rows, backend, chunk_bytes=chunk_bytes, divergence=divergence)
        assert (ours["dstudent_hidden"].double() - truth).norm() <= allowed
