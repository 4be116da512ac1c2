"""Top-k distillation: against a second spelling, float64, and the dense loss at K = V."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepfusion_kernels import topk_kl_distillation
from tests.budget import UNIT, assert_within_budget

STEM = "topk_kl"
KINDS = [
    *itertools.product(("bucket", "renormalize"), ("forward_kl", "reverse_kl", "jsd")),
    ("zero", "forward_kl"),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def teacher_of(T: int, V: int, K: int, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    logprobs, ids = (3 * torch.randn(T, V, dtype=torch.float64) / tau).log_softmax(-1).topk(K)
    return ids, logprobs


def by_torch(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: str,
    divergence: str,
    beta: float,
    tau: float,
) -> Tensor:
    """KD rows in torch's own functions; ids distinct and inside."""
    lnq = ((logits / tau) if tail == "renormalize" else (logits / tau).log_softmax(-1)).gather(
        1, ids
    )
    if tail == "renormalize":
        lnq, logprobs = lnq.log_softmax(-1), logprobs.log_softmax(-1)
    if tail == "bucket":
        lnq, logprobs = (
            torch.cat([x, (1 - x.exp().sum(1, keepdim=True)).clamp(min=2**-24).log()], 1)
            for x in (lnq, logprobs)
        )
    if divergence == "forward_kl":
        return F.kl_div(lnq, logprobs, log_target=True, reduction="none").sum(-1)
    if divergence == "reverse_kl":
        return F.kl_div(logprobs, lnq, log_target=True, reduction="none").sum(-1)
    m = (beta * logprobs.exp() + (1 - beta) * lnq.exp()).log()
    of_teacher = F.kl_div(m, logprobs, log_target=True, reduction="none").sum(-1)
    return beta * of_teacher + (1 - beta) * F.kl_div(m, lnq, log_target=True, reduction="none").sum(
        -1
    )


def gradient(
    logits: Tensor, *teacher: Tensor, upstream: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    rows = topk_kl_distillation(logits, *teacher, reduction="none", **options)
    rows.backward(upstream.to(rows.dtype))
    assert logits.grad is not None
    return rows.detach(), logits.grad


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
    logits = torch.randn(6, 50, dtype=torch.float64)
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
        torch.testing.assert_close(rows, dense, rtol=0, atol=3e-6)


@pytest.mark.parametrize("tail,divergence", KINDS)
def test_padding_and_repeated_ids_add_nothing(tail: str, divergence: str, backend: str) -> None:
    logits, options = (
        torch.randn(3, 20),
        {"tail": tail, "divergence": divergence, "backend": backend},
    )
    ids, logprobs = teacher_of(3, 20, 4)
    logprobs = logprobs.float()
    more = torch.cat([ids, torch.tensor([[-1, 20, 2**31 - 1]] * 3), ids[:, :2]], 1)
    extra = torch.cat([logprobs, torch.zeros(3, 3), torch.zeros(3, 2)], 1)
    plain = gradient(logits, ids, logprobs, upstream=torch.ones(3), **options)
    padded = gradient(logits, more.int(), extra, upstream=torch.ones(3), **options)
    for ours, wanted in zip(padded, plain, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("tail,divergence", KINDS)
def test_a_row_of_padding_has_no_loss(tail: str, divergence: str, backend: str) -> None:
    ids, logprobs = torch.full((2, 3), -1), torch.zeros(2, 3)
    for kept in (3, 0):
        rows, found = gradient(
            torch.randn(2, 9), ids[:, :kept], logprobs[:, :kept], upstream=torch.ones(2), tail=tail,
            divergence=divergence, backend=backend,
        )  # fmt: skip
        assert rows.abs().max() < 1e-6
        assert found.abs().max() < 1e-6


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


def test_masked_rows_are_never_read(backend: str, poisoned_memory: None) -> None:
    logits = torch.randn(4, 12)
    logits[1], logits[2] = torch.nan, torch.inf
    ids, logprobs = teacher_of(4, 12, 3)
    labels, weight = torch.tensor([0, -100, 5, 2]), torch.tensor([1.0, 1.0, 0.0, 3.0])
    logits.requires_grad_()
    loss = topk_kl_distillation(
        logits, ids, logprobs.float(), labels, row_weight=weight, ce_weight=1.0, backend=backend
    )
    loss.backward()
    kept = [0, 3]
    rows = topk_kl_distillation(
        logits[kept],
        ids[kept],
        logprobs[kept].float(),
        labels[kept],
        ce_weight=1.0,
        reduction="none",
        backend=backend,
    )
    torch.testing.assert_close(loss, (rows * weight[kept]).sum() / 4)
    assert logits.grad is not None
    assert (logits.grad[1:3] == 0).all()
    none = topk_kl_distillation(
        logits, ids, logprobs.float(), torch.full((4,), -100), backend=backend
    )
    assert none == 0


def test_infinities_stay_in_their_row(backend: str) -> None:
    logits = torch.randn(5, 6)
    logits[0, 0], logits[1], logits[2, 3], logits[4, 5] = (
        -torch.inf,
        -torch.inf,
        torch.nan,
        -torch.inf,
    )
    ids = torch.arange(2).expand(5, 2)
    logprobs = torch.full((5, 2), 0.25).log()
    rows = topk_kl_distillation(logits, ids, logprobs, reduction="none", backend=backend)
    assert rows[0] == torch.inf
    assert rows[1:3].isnan().all()
    assert rows[3:].isfinite().all()


def test_slices_and_leading_dimensions(backend: str) -> None:
    logits, (ids, logprobs) = torch.randn(2, 5, 7), teacher_of(8, 7, 3)
    ids, logprobs = ids.view(2, 4, 3), logprobs.view(2, 4, 3).float()
    for view in (
        logits[:, :-1],
        logits.transpose(0, 1)[:4].transpose(0, 1),
        logits[:, 1:, :].clone(),
    ):
        rows, found = gradient(view, ids, logprobs, upstream=torch.ones(2, 4), backend=backend)
        flat, wanted = gradient(
            view.reshape(8, 7),
            ids.view(8, 3),
            logprobs.view(8, 3),
            upstream=torch.ones(8),
            backend=backend,
        )
        assert torch.equal(rows.view(8), flat)
        assert torch.equal(found.view(8, 7), wanted)
    single = topk_kl_distillation(logits[0, 0], ids[0, 0], logprobs[0, 0], backend=backend)
    assert torch.equal(
        single, topk_kl_distillation(logits[:1, 0], ids[:1, 0], logprobs[:1, 0], backend=backend)
    )
    empty = torch.randn(0, 7, requires_grad=True)
    loss = topk_kl_distillation(empty, ids.view(8, 3)[:0], logprobs.view(8, 3)[:0], backend=backend)
    loss.backward()
    assert loss == 0
    assert empty.grad is not None


def test_two_backwards_agree_and_a_second_derivative_is_refused(backend: str) -> None:
    logits = torch.randn(3, 8, requires_grad=True)
    ids, logprobs = teacher_of(3, 8, 2)
    loss = topk_kl_distillation(logits, ids, logprobs.float(), backend=backend)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, logits, create_graph=True)
    torch.testing.assert_close(3 * first, second.detach())
    with pytest.raises(RuntimeError):
        second.sum().backward()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"tail": "drop"}, "tail must be one of"),
        ({"tail": "zero", "divergence": "jsd"}, "divergence with tail 'zero' must be"),
        (
            {"teacher_ids": torch.zeros(2, 2, dtype=torch.int64)},
            r"teacher_ids must be \[..., K\] = \[3, 2\]",
        ),
        ({"teacher_ids": torch.zeros(3, 2)}, "teacher_ids must have dtype int64, int32"),
        (
            {"teacher_logprobs": torch.zeros(3, 2, requires_grad=True)},
            "teacher_logprobs must be detached",
        ),
        ({"teacher_ids": None}, "teacher_ids must be given when"),
        ({"ce_weight": 1.0}, "labels must be given when"),
        ({"ce_weight": 1.0, "labels": torch.tensor([0, 8, 1])}, r"labels must be in .* = \[0, 8\)"),
        ({"labels": torch.zeros(3)}, "labels must have dtype int64, int32"),
        ({"temperature": 0.0}, "temperature must be finite and >= 1e-6"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str, backend: str) -> None:
    arguments: dict[str, object] = {
        "student_logits": torch.zeros(3, 8),
        "teacher_ids": torch.zeros(3, 2, dtype=torch.int64),
        "teacher_logprobs": torch.zeros(3, 2),
    }
    with pytest.raises(ValueError, match=message):
        topk_kl_distillation(**(arguments | change), backend=backend)
