"""Top-k distillation: against a second spelling, float64, and the dense loss at K = V."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepfusion_kernels import topk_kl_distillation
from tests.budget import UNIT, assert_within_budget
from tests.ops.topk_inputs import KINDS, by_torch, gradient, teacher_of

STEM = "topk_kl"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("on_device")


@pytest.mark.parametrize("tail,divergence", KINDS)
def test_reference_is_the_gradient_of_its_second_spelling(tail: str, divergence: str) -> None:
    ids, logprobs = teacher_of(4, 11, 3, 2.0)
    logits = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, 0, -100, 10])
    options = {"tail": tail, "divergence": divergence, "beta": 0.3, "temperature": 2.0}

    def ours(x: Tensor) -> Tensor:
        return topk_kl_distillation(
            x, ids, logprobs, labels, **options, scale_by_temperature_squared=True, ce_weight=0.5,
            reduction="none", backend="reference",
        )  # fmt: skip

    theirs = 4 * by_torch(logits, ids, logprobs, tail, divergence, 0.3, 2.0)
    theirs = (theirs + 0.5 * F.cross_entropy(logits, labels, reduction="none")) * (labels >= 0)
    torch.testing.assert_close(ours(logits), theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail,divergence", KINDS)
def test_rows_and_gradient_within_budget(
    tail: str, divergence: str, dtype: torch.dtype, backend: str, poisoned_memory: None
) -> None:
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(NotImplementedError, match=r"triton: .* got float64"):
            topk_kl_distillation(
                torch.zeros(2, 3, dtype=dtype), *teacher_of(2, 3, 1), backend=backend
            )
        return
    for T, V, K, tau, beta, ce in (
        (3, 33, 1, 0.5, 0.1, 0.0),
        (5, 4097, 40, 2.0, 0.9, 0.7),
        (2, 1, 1, 1.0, 0.5, 0.5),
    ):
        logits = (3 * torch.randn(T, V)).to(dtype)
        ids, logprobs = teacher_of(T, V, K, tau)
        logprobs = logprobs if dtype == torch.float64 else logprobs.float()
        upstream = torch.rand(T).double() + 0.5
        options = {
            "tail": tail,
            "divergence": divergence,
            "beta": beta,
            "temperature": tau,
            "ce_weight": ce,
        }
        labels = torch.randint(V, (T,)) if ce else None
        teacher = (ids, logprobs, labels) if ce else (ids, logprobs)
        rows, found = gradient(logits, *teacher, upstream=upstream, backend=backend, **options)
        truth = gradient(
            logits.double(),
            ids,
            logprobs.double(),
            *teacher[2:],
            upstream=upstream,
            backend="reference",
            **options,
        )
        wide = logits if dtype == torch.float64 else logits.float()
        wide = wide.detach().requires_grad_()
        eager = by_torch(wide, ids, logprobs.to(wide.dtype), tail, divergence, beta, tau)
        if labels is not None:
            eager = eager + ce * F.cross_entropy(wide, labels, reduction="none")
        eager.backward(upstream.to(wide.dtype))
        assert wide.grad is not None
        rows_floor = 4e-6 * max(1.0, float(truth[0].abs().max()))
        assert_within_budget(rows, eager.detach(), truth[0], "rows", rows_floor)
        floor = UNIT[dtype] * truth[1].abs().max() + 4e-6 * upstream.max() / tau
        assert_within_budget(found, wide.grad.to(dtype), truth[1], "dlogits", floor)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_all_tokens_kept_equals_dense(divergence: str, backend: str) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float64
    logits = torch.randn(6, 50, dtype=dtype)
    ids, logprobs = teacher_of(6, 50, 50)
    for tail in ("bucket", "renormalize"):
        rows = topk_kl_distillation(
            logits,
            ids,
            logprobs,
            tail=tail,
            divergence=divergence,
            reduction="none",
            backend=backend,
        )
        dense = by_torch(logits, ids, logprobs, "renormalize", divergence, 0.5, 1.0)
        torch.testing.assert_close(rows, dense.to(dtype), rtol=0, atol=3e-6)


def test_teacher_mass_above_one_stays_finite(backend: str) -> None:
    ids, logprobs = teacher_of(4, 30, 5)
    logprobs = (logprobs.log_softmax(-1) + 1e-3).float()
    rows, found = gradient(
        torch.randn(4, 30), ids, logprobs, upstream=torch.ones(4), backend=backend
    )
    assert rows.isfinite().all()
    assert found.isfinite().all()


def test_zero_tail_may_be_negative(backend: str) -> None:
    ids, logprobs = torch.tensor([[0, 1]]), torch.tensor([[0.1, 0.1]]).log()
    rows = topk_kl_distillation(
        torch.tensor([[9.0, 9.0, 0.0]]),
        ids,
        logprobs,
        tail="zero",
        reduction="none",
        backend=backend,
    )
    assert rows[0] < -0.1


def test_bucket_is_right_where_the_student_is_sure(backend: str) -> None:
    """q_o of 1e-5: 1 - sum q in float32 would be wrong by a percent."""
    logits = torch.cat([torch.full((1, 2), 12.0), torch.zeros(1, 40)], 1)
    ids, logprobs = torch.tensor([[0, 1]]), torch.tensor([[0.4, 0.4]]).log()
    for divergence in ("forward_kl", "jsd"):
        options = {"upstream": torch.ones(1), "divergence": divergence}
        found = gradient(logits, ids, logprobs, backend=backend, **options)[1]
        truth = gradient(logits.double(), ids, logprobs.double(), backend="reference", **options)[1]
        bar = 1e-6 if backend != "reference" else 2e-2
        torch.testing.assert_close(found.double(), truth, rtol=bar, atol=1e-8)
