"""The module across tokenizers: what it compares of a text, masks, options, learning."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import (
    AlignedBatch,
    CrossTokenizer,
    align_batch,
    paired_rows,
)
from deepfusion_kernels.nn import CrossTokenizerLoss
from tests.cross_tokenizer.made import tokenizer
from tests.nn.test_cross_tokenizer_losses import (
    TEXTS,
    alm_spelling,
    both_sides,
    draw,
    mapped_spelling,
    uld_spelling,
)


def module_for(bridge: str, both: CrossTokenizer, **options: Any) -> CrossTokenizerLoss:
    if bridge == "mapped":
        options["vocabulary_map"] = both.vocabulary_map()
    return CrossTokenizerLoss(bridge, **options)


def logits_for(batch: AlignedBatch, both: CrossTokenizer) -> tuple[Tensor, Tensor]:
    sizes = [len(side.tokenizer) for side in (both.student, both.teacher)]
    return (
        draw(*batch.student_ids.shape, sizes[0]).requires_grad_(),
        draw(*batch.teacher_ids.shape, sizes[1], seed=2),
    )


@pytest.mark.parametrize("bridge", ["mapped", "uld", "alm"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_module_compares_the_rows_and_spans_of_the_text(bridge: str, reduction: str) -> None:
    both, batch = both_sides()
    student, teacher = logits_for(batch, both)
    ours = module_for(bridge, both, reduction=reduction, top_k=10**6)(student, teacher, batch)
    losses = []
    for b in range(len(TEXTS)):
        spans = [batch.student_spans[b].tolist(), batch.teacher_spans[b].tolist()]
        for (i, j), (k, m) in zip(*spans, strict=True):
            if i == j or i == 0 or k == 0:
                continue
            rows = student[b, i - 1][None], teacher[b, k - 1][None]
            if bridge == "uld":
                losses.append(uld_spelling(*rows, 1.0))
            elif bridge == "mapped" and j - i == m - k == 1:
                losses.append(mapped_spelling(*rows, both.vocabulary_map(), 1.0))
            elif bridge == "alm":
                logprobs = [
                    logits[b, place - 1].log_softmax(-1)[ids[b, place]]
                    for logits, ids, span in (
                        (student, batch.student_ids, range(i, j)),
                        (teacher, batch.teacher_ids, range(k, m)),
                    )
                    for place in span
                ]
                table = torch.stack(logprobs)[None]
                ours_at = torch.tensor([[[0, j - i]]])
                theirs_at = torch.tensor([[[j - i, len(logprobs)]]])
                losses.append(alm_spelling(table, table.detach(), ours_at, theirs_at, 100.0)[0])
    assert len(losses) >= 3
    total = torch.cat(losses).sum()
    wanted = total / len(losses) if reduction == "mean" else total
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-7, check_dtype=False)
    gradients = [torch.autograd.grad(one, student, retain_graph=True)[0] for one in (ours, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bridge", ["mapped", "uld", "alm"])
def test_padding_and_special_tokens_are_never_read(bridge: str) -> None:
    both = CrossTokenizer(tokenizer("byte-300"), tokenizer("unigram"))
    ids = [tokenizer("byte-300")(text)["input_ids"] for text in TEXTS]
    batch = align_batch([both.align_ids([*ids[0], 0, *ids[1]])], student_length=60)
    student, teacher = logits_for(batch, both)
    truth = module_for(bridge, both)(student, teacher, batch)
    spoilt, spoilt_teacher = student.detach().clone(), teacher.clone()
    spoilt[:, int(batch.student_spans.max()) :] = torch.nan
    used = paired_rows(batch, whole_token=False)
    assert int(used.max()) < int(batch.teacher_spans.max())
    spoilt_teacher[:, int(batch.teacher_spans[0, :, 1].max()) :] = torch.nan
    again = module_for(bridge, both)(spoilt.requires_grad_(), spoilt_teacher, batch)
    torch.testing.assert_close(again, truth)
    (gradient,) = torch.autograd.grad(again, spoilt)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("bridge", ["mapped", "uld", "alm"])
def test_nothing_to_compare_is_zero(bridge: str) -> None:
    both, _ = both_sides()
    batch = align_batch([both.align("")], student_length=3, teacher_length=2)
    student, teacher = logits_for(batch, both)
    loss = module_for(bridge, both)(student, teacher, batch)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("bridge", ["mapped", "uld", "alm"])
def test_equal_models_have_no_loss_where_that_is_what_it_says(bridge: str) -> None:
    both = CrossTokenizer(tokenizer("byte-300"), tokenizer("byte-300"))
    batch = align_batch([both.align(text) for text in TEXTS])
    student, _ = logits_for(batch, both)
    loss = module_for(bridge, both, top_k=10**6)(student, student.detach(), batch)
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(float(loss.detach())) <= 1e-6
    assert gradient.abs().max() <= 1e-6


@pytest.mark.parametrize("bridge", ["mapped", "uld", "alm"])
def test_a_student_learns_from_another_tokenizer(bridge: str) -> None:
    both, batch = both_sides()
    student, teacher = logits_for(batch, both)
    student = student.detach().float().requires_grad_()
    optimizer = torch.optim.Adam([student], 0.2)
    loss_of = module_for(bridge, both)
    losses = []
    for _ in range(30):
        loss = loss_of(student, teacher.float(), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_options_are_refused() -> None:
    both, batch = both_sides()
    with pytest.raises(ValueError, match="bridge must be one of 'mapped', 'uld', 'alm'"):
        CrossTokenizerLoss("shared")
    with pytest.raises(ValueError, match="vocabulary_map must be given for 'mapped' alone"):
        CrossTokenizerLoss("mapped")
    student, teacher = logits_for(batch, both)
    with pytest.raises(ValueError, match=r"teacher_logits must be \[B, L_t, V_t\]"):
        CrossTokenizerLoss("uld")(student, teacher[:, 1:], batch)


def test_same_call_same_bits() -> None:
    both, batch = both_sides()
    logits = logits_for(batch, both)
    for bridge in ("mapped", "uld", "alm"):
        module = module_for(bridge, both)
        torch.testing.assert_close(module(*logits, batch), module(*logits, batch), rtol=0, atol=0)
