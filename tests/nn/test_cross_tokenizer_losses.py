"""Losses across tokenizers: second spellings, gradcheck, masks, and what they say of one text."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deepfusion_kernels import (
    AlignedBatch,
    CrossTokenizer,
    align_batch,
    alm_distillation,
    kl_distillation,
    mapped_distillation,
    uld_distillation,
)
from deepfusion_kernels.nn.alm import _odds
from deepfusion_kernels.nn.uld import _forward as uld_op
from tests.budget import assert_within_budget
from tests.cross_tokenizer.made import tokenizer

TEXTS = ["the end of the day", "café 🙂 of the day\r\n"]


def both_sides() -> tuple[CrossTokenizer, AlignedBatch]:
    both = CrossTokenizer(tokenizer("byte-300"), tokenizer("unigram"))
    return both, align_batch([both.align(text) for text in TEXTS])


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * values).to(dtype)


def uld_spelling(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """From torch's own sort and its derivative."""
    width = max(student.shape[-1], teacher.shape[-1])
    sides = [
        F.pad(torch.sort((one / tau).softmax(-1), -1, True)[0], (0, width - one.shape[-1]))
        for one in (student, teacher)
    ]
    return F.l1_loss(*sides, reduction="none").sum(-1)


@pytest.mark.parametrize("widths", [(9, 9), (7, 12), (12, 7), (1, 5), (4, 1)])
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_uld_is_its_second_spelling_and_passes_gradcheck(
    widths: tuple[int, int], tau: float
) -> None:
    student, teacher = draw(5, widths[0]).requires_grad_(), draw(5, widths[1], seed=2)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    truth = uld_spelling(student, teacher, tau) * weight
    for reduction, wanted in (
        ("none", truth),
        ("sum", truth.sum()),
        ("mean", truth.sum() / weight.sum()),
    ):
        options: dict[str, Any] = {"row_weight": weight, "reduction": reduction}
        ours = uld_distillation(student, teacher, temperature=tau, **options)
        torch.testing.assert_close(ours, wanted)
        gradients = [
            torch.autograd.grad(one.sum(), student, retain_graph=True)[0] for one in (ours, wanted)
        ]
        torch.testing.assert_close(*gradients)
    torch.autograd.gradcheck(
        lambda s: uld_distillation(s, teacher, temperature=tau, row_weight=weight), student
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_uld_within_budget_in_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # no two logits of a row are equal in any dtype: among equals the order is free
    order = draw(6, 250).argsort(-1)
    student, teacher = (order / 16 - 8).to(dtype), draw(6, 233, seed=2, dtype=dtype)
    monkeypatch.setattr("deepfusion_kernels.nn.uld.CHUNK_BYTES", 4 * 4 * (250 + 233))
    results = []
    for wide in (None, torch.float32, torch.float64):
        s = student.clone() if wide is None else student.to(wide)
        s.requires_grad_()
        loss = uld_distillation if wide is None else uld_spelling
        given = teacher if wide is None else teacher.to(wide)
        rows = (
            loss(s, given, temperature=1.0, reduction="none")
            if wide is None
            else loss(s, given, 1.0)
        )
        (gradient,) = torch.autograd.grad(rows.sum(), s)
        results.append((rows.detach(), gradient))
    (rows, gradient), (eager_rows, eager), (truth_rows, truth) = results
    assert_within_budget(rows, eager_rows, truth_rows, "row loss")
    assert gradient.dtype == dtype
    assert_within_budget(gradient, eager.to(dtype), truth, "gradient")


def test_uld_masked_rows_are_never_read() -> None:
    student, teacher = draw(3, 6), draw(3, 8, seed=2)
    student[1], teacher[1] = torch.nan, torch.inf
    student.requires_grad_()
    loss = uld_distillation(
        student, teacher, row_weight=torch.tensor([1.0, 0, 1], dtype=torch.float64)
    )
    loss.backward()
    kept = uld_spelling(student[[0, 2]].detach(), teacher[[0, 2]], 1.0)
    torch.testing.assert_close(loss.detach(), kept.mean())
    assert student.grad is not None
    assert not student.grad[1].any()
    nothing = uld_distillation(student, teacher, row_weight=torch.zeros(3, dtype=torch.float64))
    assert float(nothing.detach()) == 0.0
    assert uld_distillation(draw(0, 4), draw(0, 5)).item() == 0.0


def test_uld_refuses_and_has_no_second_derivative() -> None:
    with pytest.raises(ValueError, match=r"teacher_logits must be \[..., V_t\] = \[3, 5\]"):
        uld_distillation(draw(3, 4), draw(2, 5))
    with pytest.raises(ValueError, match="teacher_logits must be detached"):
        uld_distillation(draw(3, 4), draw(3, 5).requires_grad_())
    with pytest.raises(ValueError, match="temperature must be finite"):
        uld_distillation(draw(3, 4), draw(3, 5), temperature=0.0)
    student = draw(3, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(
        uld_distillation(student, draw(3, 5)), student, create_graph=True
    )
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def alm_spelling(
    student: Tensor, teacher: Tensor, ours: Tensor, theirs: Tensor, tau: float
) -> Tensor:
    """Span by span, the binary KL by F.kl_div."""
    rows = []
    for b in range(len(ours)):
        for (i, j), (k, m) in zip(ours[b].tolist(), theirs[b].tolist(), strict=True):
            if i == j or k == m:
                rows.append(student.sum() * 0)
                continue
            yes = [student[b, i:j].sum() / tau, teacher[b, k:m].sum() / tau]
            log_a, log_b = (torch.stack([one, torch.log(-torch.expm1(one))]) for one in yes)
            rows.append(tau * F.kl_div(log_a, log_b, log_target=True, reduction="sum"))
    return torch.stack(rows).view(ours.shape[:2])


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_alm_is_its_second_spelling_and_passes_gradcheck(tau: float) -> None:
    _, batch = both_sides()
    student = -draw(*batch.student_ids.shape).abs()
    teacher = -draw(*batch.teacher_ids.shape, seed=2).abs()
    student.requires_grad_()
    spans = batch.student_spans, batch.teacher_spans
    truth = alm_spelling(student, teacher, *spans, tau)
    ours = alm_distillation(student, teacher, *spans, temperature=tau, reduction="none")
    torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-12)
    gradients = [
        torch.autograd.grad(one.sum(), student, retain_graph=True)[0] for one in (ours, truth)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)
    torch.autograd.gradcheck(
        lambda s: alm_distillation(s, teacher, *spans, temperature=tau), student
    )
    held = (batch.student_spans[..., 1] > batch.student_spans[..., 0]).sum()
    mean = alm_distillation(student, teacher, *spans, temperature=tau)
    torch.testing.assert_close(mean, truth.sum() / held)
    bare = alm_distillation(student, teacher, *spans, temperature=tau, scale_by_temperature=False)
    torch.testing.assert_close(bare * tau, mean)


def test_alm_limit_of_large_temperature() -> None:
    """(l_T - l_S) - l_T ln(l_T / l_S), with derivative l_T / l_S - 1."""
    spans = torch.tensor([[[0, 2], [2, 3]]])
    student = torch.tensor([[-0.5, -1.0, -3.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-1.0, -1.5, -0.2]], dtype=torch.float64)
    loss = alm_distillation(student, teacher, spans, spans, temperature=1e5, reduction="none")
    l_s, l_t = torch.tensor([[-1.5, -3.0]]).double(), torch.tensor([[-2.5, -0.2]]).double()
    torch.testing.assert_close(loss, l_t - l_s - l_t * (l_t / l_s).log(), rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    slopes = (l_t / l_s - 1)[0]
    torch.testing.assert_close(gradient[0], slopes[[0, 0, 1]], rtol=1e-4, atol=1e-6)


def test_alm_edges() -> None:
    """Equal sides 0; certain, impossible and masked spans; float32 keeps small losses."""
    spans = torch.tensor([[[0, 1], [1, 2], [2, 3], [3, 3]]])
    student = torch.tensor([[-0.3, 0.0, torch.nan]], requires_grad=True)
    teacher = torch.tensor([[-0.3, -1.0, torch.inf]])
    weight = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    rows = alm_distillation(student, teacher, spans, spans, span_weight=weight, reduction="none")
    assert rows.dtype == torch.float32
    assert rows[0, [0, 2, 3]].tolist() == [0.0, 0.0, 0.0]
    assert rows.isfinite().all()
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    assert gradient.tolist() == [[0.0, 0.0, 0.0]], "equal, clipped and masked spans do not pull"
    never = torch.tensor([[-torch.inf, -1.0, -1.0]])
    some = torch.tensor([[-1.0, -1.0, -1.0]])
    assert alm_distillation(some, never, spans, spans, reduction="none").isfinite().all()
    assert alm_distillation(never, some, spans, spans, reduction="none")[0, 0] == torch.inf
    near = torch.tensor([[-1.0001, -1.0, -1.0]])
    small = alm_distillation(near, some, spans, spans, reduction="none")[0, 0]
    assert float(small) == pytest.approx(0.5 * (near[0, 0] + 1).double().item() ** 2, rel=1e-2)
    with pytest.raises(ValueError, match="teacher_logprobs must be detached"):
        alm_distillation(some, some.clone().requires_grad_(), spans, spans)
    with pytest.raises(ValueError, match=r"student_spans must be \[B, C, two\]"):
        alm_distillation(some, some, spans[0], spans)


def mapped_spelling(student: Tensor, teacher: Tensor, table: Tensor, tau: float) -> Tensor:
    """KL between V_s + 1 outcomes: mapped mass in student order, the rest as the last one."""
    p = (teacher / tau).softmax(-1)
    q = (student / tau).softmax(-1)
    moved = torch.zeros(*p.shape[:-1], student.shape[-1] + 1, dtype=p.dtype)
    moved.index_add_(-1, torch.where(table >= 0, table, student.shape[-1]), p)
    reached = F.pad(torch.zeros(student.shape[-1]).index_fill(0, table[table >= 0], 1.0), (0, 1))
    rest = (q * (1 - reached[:-1])).sum(-1, keepdim=True)
    outcomes = torch.cat([q, rest], -1)
    kept = torch.cat([reached[:-1], torch.ones(1)]) > 0
    return F.kl_div(outcomes[..., kept].log(), moved[..., kept], reduction="none").sum(-1)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_mapped_is_its_second_spelling_and_passes_gradcheck(tau: float) -> None:
    student, teacher = draw(2, 3, 9).requires_grad_(), draw(2, 3, 7, seed=2)
    table = torch.tensor([3, -1, 0, 3, 8, -1, 5])  # two teacher tokens are one of the student
    kept = (teacher / tau).log_softmax(-1).topk(7)
    arguments = kept.indices, kept.values, table
    truth = mapped_spelling(student, teacher, table, tau)
    ours = mapped_distillation(student, *arguments, temperature=tau, reduction="none")
    torch.testing.assert_close(ours, truth, rtol=1e-7, atol=1e-9)
    gradients = [
        torch.autograd.grad(one.sum(), student, retain_graph=True)[0] for one in (ours, truth)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    torch.autograd.gradcheck(
        lambda s: mapped_distillation(s, *arguments, temperature=tau, backend="reference"), student
    )


def test_mapped_by_the_identity_is_the_dense_loss() -> None:
    student, teacher = draw(4, 11).requires_grad_(), draw(4, 11, seed=2)
    kept = teacher.log_softmax(-1).topk(11)
    ours = mapped_distillation(student, kept.indices, kept.values, torch.arange(11))
    dense = kl_distillation(student, teacher)
    torch.testing.assert_close(ours, dense, rtol=1e-6, atol=1e-7)
    gradients = [torch.autograd.grad(one, student, retain_graph=True)[0] for one in (ours, dense)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="vocabulary_map must have dtype int64"):
        mapped_distillation(student, kept.indices, kept.values, torch.ones(11))
    padding = mapped_distillation(student, kept.indices + 11, kept.values, torch.arange(11))
    assert float(padding.detach()) == 0.0, "ids outside the teacher's vocabulary are padding"


def test_ops_are_opaque_to_graphs() -> None:
    student, teacher = draw(4, 6).requires_grad_(), draw(4, 9, seed=2)
    scale = torch.ones(4, dtype=torch.float64)
    torch.library.opcheck(uld_op, (student, teacher, scale, 1.0, True))
    torch.library.opcheck(_odds, (-student.abs(), -draw(4, 6, seed=3).abs(), 100.0))
    compiled = torch.compile(uld_distillation, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), uld_distillation(student, teacher))
