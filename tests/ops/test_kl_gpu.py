"""The distillation doors on a GPU: graphs, synchronisation, large offsets, races by repetition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import (
    fused_linear_kl_distillation,
    kl_distillation,
    topk_kl_distillation,
    topk_logprobs,
)
from tests.conftest import why_not
from tests.ops.captured_graph import assert_a_captured_graph_follows

# `make gpu OPS=...` runs the file for each of them
STEMS = ("kl_distillation", "fused_linear_kl", "topk_kl")
pytestmark = pytest.mark.gpu
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
Call = Callable[[], tuple[Tensor, ...]]


def dense(T: int, V: int, divergence: str, chosen: str) -> tuple[list[Tensor], Call]:
    """Tensors that a call reads, and the call: its loss and gradients."""
    student, teacher = (torch.randn(T, V, device="cuda").bfloat16() for _ in range(2))
    student.requires_grad_()
    labels = torch.randint(V, (T,), device="cuda")
    options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "ce_weight": 0.5}

    def call() -> tuple[Tensor, ...]:
        loss = kl_distillation(student, teacher, labels, **options, backend=chosen)
        return loss.detach(), *torch.autograd.grad(loss, student)

    return [student, teacher], call


def topk(T: int, V: int, divergence: str, chosen: str) -> tuple[list[Tensor], Call]:
    student, teacher = (torch.randn(T, V, device="cuda").bfloat16() for _ in range(2))
    student.requires_grad_()

    def call() -> tuple[Tensor, ...]:
        ids, logprobs = topk_logprobs(teacher, 64, backend=chosen)
        loss = topk_kl_distillation(student, ids, logprobs, divergence=divergence, backend=chosen)
        return loss.detach(), *torch.autograd.grad(loss, student)

    return [student, teacher], call


def fused(T: int, V: int, divergence: str, chosen: str) -> tuple[list[Tensor], Call]:
    D = 64
    hidden, weight, of_teacher, head = (
        torch.randn(rows, D, device="cuda").bfloat16() for rows in (T, V, T, V)
    )
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    labels = torch.randint(V, (T,), device="cuda")

    def call() -> tuple[Tensor, ...]:
        loss = fused_linear_kl_distillation(
            hidden, weight, of_teacher, head, labels, divergence=divergence, ce_weight=0.5,
            backend=chosen, chunk_bytes=128 * 8 * (V + 32),
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return [hidden, weight, of_teacher, head], call


MAKERS = [
    pytest.param(make, chosen, id=f"{make.__name__}-{chosen}")
    for make, chosen in ((dense, "triton"), (dense, "cuda"), (topk, "triton"), (fused, "triton"))
]


def skip_unless(chosen: str) -> None:
    reason = why_not(chosen)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("make", "chosen"), MAKERS)
def test_repeated_calls_give_the_same_bits(make: Any, chosen: str, divergence: str) -> None:
    """A race would show in one of ten: many rows, several blocks of columns."""
    skip_unless(chosen)
    _, call = make(300, 32000, divergence, chosen)
    first = call()
    for _ in range(10):
        assert all(torch.equal(one, other) for one, other in zip(call(), first, strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("make", "chosen"), MAKERS)
def test_no_call_waits_for_the_device(make: Any, chosen: str, divergence: str) -> None:
    skip_unless(chosen)
    _, call = make(40, 5000, divergence, chosen)
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("make", "chosen"), MAKERS)
def test_a_captured_graph_follows_its_inputs(make: Any, chosen: str) -> None:
    skip_unless(chosen)
    inputs, call = make(40, 5000, "jsd", chosen)

    def change_inputs() -> None:
        for tensor in inputs:
            tensor.copy_(torch.randn_like(tensor))

    assert_a_captured_graph_follows(call, change_inputs)


@pytest.mark.parametrize("chosen", ["triton", "cuda"])
def test_offsets_past_two_to_the_31(chosen: str) -> None:
    """The last rows of 2.16e9 logits are those rows alone."""
    skip_unless(chosen)
    T, V, last = 14200, 151936, 3
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    assert T * V > 2**31
    student, teacher = (torch.zeros(T, V, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    student[-last:], teacher[-last:] = torch.randn(2, last, V, device="cuda").bfloat16()
    rows, gradient = rows_and_gradient(student, teacher, chosen)
    alone, wanted = rows_and_gradient(student[-last:].clone(), teacher[-last:].clone(), chosen)
    assert torch.equal(rows[-last:], alone)
    assert torch.equal(gradient[-last:], wanted)
    assert not rows[:-last].any()


def rows_and_gradient(student: Tensor, teacher: Tensor, chosen: str) -> tuple[Tensor, Tensor]:
    student.requires_grad_()
    rows = kl_distillation(student, teacher, reduction="none", backend=chosen)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    return rows.detach(), gradient


def test_topk_offsets_past_two_to_the_31() -> None:
    skip_unless("triton")
    T, V, last = 14200, 151936, 3
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    student = torch.zeros(T, V, device="cuda", dtype=torch.bfloat16)
    student[-last:] = torch.randn(last, V, device="cuda").bfloat16()
    ids = torch.arange(8, device="cuda").expand(T, 8)
    logprobs = torch.full((T, 8), 0.1, device="cuda").log()
    found = []
    for part in (slice(None), slice(T - last, T)):
        leaf = student[part].clone().requires_grad_()
        rows = topk_kl_distillation(leaf, ids[part], logprobs[part], reduction="none")
        found.append((rows.detach(), *torch.autograd.grad(rows.sum(), leaf)))
    for whole, alone in zip(*found, strict=True):
        assert torch.equal(whole[-last:], alone)
