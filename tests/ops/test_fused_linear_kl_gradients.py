"""Gradients of the fused linear loss: which are made, when, from what memory, and how often."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from deepfusion_kernels import fused_linear_kl_distillation
from tests.ops.fused_linear_kl_inputs import CHUNKS, NAMES, inputs, run

STEM = "fused_linear_kl"


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_wanted_gradients(reduction: str, chunks: str, backend: str) -> None:
    """A frozen head, frozen hidden states, all of it frozen: the rest does not change by a bit."""
    arguments = inputs(8, 30)
    options = {"reduction": reduction, "chunk_bytes": CHUNKS[chunks]}
    whole = run(arguments, backend, **options)
    for count in range(1, 4):
        for wants in itertools.combinations(NAMES, count):
            for name, value in run(arguments, backend, wants, **options).items():
                assert torch.equal(value, whole[name]), name
    assert not fused_linear_kl_distillation(**arguments, backend=backend).requires_grad
    alone = run(arguments, backend, (), **options)["loss"]
    torch.testing.assert_close(alone, whole["loss"])


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


@pytest.mark.parametrize("chunks", CHUNKS)
def test_last_backward_leaves_earlier_gradients_alone(chunks: str, backend: str) -> None:
    """It may take the memory of what forward kept; a graph that is kept must not see that."""
    arguments = inputs(10, 61)
    wanted = [arguments[name].requires_grad_() for name in NAMES]
    loss = 3 * fused_linear_kl_distillation(
        **arguments, backend=backend, chunk_bytes=CHUNKS[chunks]
    )
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    before = [gradient.clone() for gradient in first]
    last = torch.autograd.grad(loss, wanted)
    for was, now, then in zip(before, first, last, strict=True):
        assert torch.equal(was, now)
        assert torch.equal(was, then)
        assert not then.requires_grad
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted)


def peak_bytes(arguments: dict[str, Any], backend: str | None) -> int:
    """The most that forward and backward hold beyond their inputs; None: eager, logits whole."""
    leaves = {name: arguments[name].requires_grad_() for name in NAMES[:2]}
    with torch.profiler.profile(profile_memory=True) as seen:
        if backend is None:
            student, teacher = (
                arguments[f"{side}_hidden"] @ arguments[f"{side}_weight"].T
                for side in ("student", "teacher")
            )
            ln_q, ln_p = student.log_softmax(-1), teacher.log_softmax(-1)
            loss = F.kl_div(ln_q, ln_p, reduction="batchmean", log_target=True)
        else:
            loss = fused_linear_kl_distillation(**arguments, backend=backend)
        loss.backward()
    events = [
        event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = itertools.accumulate(
        event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())
    )
    peak = max(held)
    for leaf in leaves.values():
        leaf.grad = None
    return peak


@pytest.mark.parametrize("V,D", [(2048, 192), (16000, 64)])
def test_extra_memory_is_a_tenth_of_eager(V: int, D: int, backend: str) -> None:
    """Beside the gradients that both return."""
    if backend != "cpu":
        pytest.skip("memory is counted for the cpu backend; the reference holds its logits whole")
    names = (f"{side}_{part}" for side in ("student", "teacher") for part in ("hidden", "weight"))
    arguments = {name: torch.randn(1024 if name.endswith("hidden") else V, D) for name in names}
    gradients = 4 * (1024 + V) * D
    ours, eager = (peak_bytes(arguments, which) - gradients for which in (backend, None))
    assert ours <= eager / 10
