"""Tables of a batch: padded spans, paired rows, patches that the feature loss takes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion_kernels import (
    CrossTokenizer,
    align_batch,
    paired_rows,
    patch_offsets,
    view_aligned_attention,
)
from deepfusion_kernels.cross_tokenizer.tables import span_of_tokens
from deepfusion_kernels.nn import ViewAlignedAttention

from .made import tokenizer
from .test_alignment import BOTH, PAIRS, known_text

TEXTS = ["the end of the day", "", "café 🙂\r\nof the treatment"]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_padding_is_in_no_span(pair: tuple[str, str]) -> None:
    alignments = [BOTH[pair].align(text) for text in TEXTS]
    batch = align_batch(alignments, student_pad=1, teacher_pad=2)
    for one, ids, mask, spans, pad in zip(
        ("student", "teacher"), batch[:2], batch[2:4], batch[4:], (1, 2), strict=True
    ):
        for b, alignment in enumerate(alignments):
            own = getattr(alignment, f"{one}_ids")
            assert ids[b].tolist() == [*own, *[pad] * (ids.shape[1] - len(own))]
            assert mask[b].tolist() == [n < len(own) for n in range(ids.shape[1])]
            own_spans = getattr(alignment, f"{one}_spans")
            assert spans[b].tolist()[: len(own_spans)] == list(map(list, own_spans))
            assert (spans[b, len(own_spans) :] == ids.shape[1]).all()
        owner = span_of_tokens(spans, ids.shape[1])
        for b, row in enumerate(owner.tolist()):
            for token, span in enumerate(row):
                within = [c for c, (s, e) in enumerate(spans[b].tolist()) if s <= token < e]
                assert within == ([] if span == spans.shape[1] else [span])


def test_lengths_cut_whole_spans() -> None:
    both = BOTH["byte-300", "unigram"]
    alignment = both.align("🙂🙂🙂")
    batch = align_batch([alignment], student_length=7, teacher_length=100)
    assert batch.student_ids.tolist() == [list(alignment.student_ids[:7])]
    assert batch.student_spans.tolist() == [[[0, 4]]]
    assert batch.student_mask.tolist() == [[True] * 4 + [False] * 3]
    assert align_batch([alignment], teacher_length=1).student_spans.shape == (1, 0, 2)
    with pytest.raises(ValueError, match="alignments must be at least one"):
        align_batch([])
    with pytest.raises(ValueError, match="student_length must be >= 1"):
        align_batch([alignment], student_length=0)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(PAIRS), st.lists(known_text, min_size=1, max_size=3), st.integers(1, 9))
def test_pairs_and_patches_hold_the_same_characters(
    pair: tuple[str, str], texts: list[str], patch_size: int
) -> None:
    alignments = [BOTH[pair].align(text) for text in texts]
    batch = align_batch(alignments, student_length=99, teacher_length=199)
    whole, loose = (paired_rows(batch, whole_token=flag) for flag in (True, False))
    tables = patch_offsets(batch, patch_size)
    assert tables[0].shape == tables[1].shape
    for b, one in enumerate(alignments):
        starts = dict(zip((s for s, _ in one.student_spans), one.teacher_spans, strict=True))
        ends = dict(one.student_spans)
        for row, teacher_row in enumerate(loose[b].tolist()):
            span = starts.get(row + 1)
            assert teacher_row == (-1 if span is None or span[0] == 0 else span[0] - 1)
            is_whole = teacher_row >= 0 and ends[row + 1] == row + 2 and span[1] - span[0] == 1
            assert whole[b, row] == (teacher_row if is_whole else -1)
        character = [
            {0: 0, **{e: c for (_, e), (_, c) in zip(spans, one.characters, strict=True)}}
            for spans in (one.student_spans, one.teacher_spans)
        ]
        cuts = [table[b].tolist() for table in tables]
        at = [[character[side][cut] for cut in cuts[side]] for side in range(2)]
        assert at[0] == at[1]
        assert at[0][-1] == (len(one.text) if one.characters else 0)
        sizes = [end - start for start, end in pairwise(cuts[0]) if end > start]
        assert all(size >= patch_size for size in sizes[:-1])
        for first, last in pairwise(cuts[0]):
            inner = [e for _, e in one.student_spans if first < e < last]
            assert all(e - first < patch_size for e in inner), "a patch ends as soon as it can"


def test_patches_serve_the_feature_loss() -> None:
    both = CrossTokenizer(tokenizer("byte-300"), tokenizer("unigram"))
    batch = align_batch([both.align(text) for text in TEXTS])
    offsets = patch_offsets(batch, 4)
    draw = torch.Generator().manual_seed(0)
    stages = [torch.randn(*batch.student_ids.shape, 6, generator=draw) for _ in range(2)]
    targets = [torch.randn(*batch.teacher_ids.shape, 5, generator=draw) for _ in range(2)]
    for stage in stages:
        stage.requires_grad_()
    views = ViewAlignedAttention(6, 5, 2, 8, 2, 4, "pool", generator=draw)
    masks = {"teacher_mask": batch.teacher_mask}
    loss = views(
        stages, targets, batch.student_mask, student_offsets=offsets[0],
        teacher_offsets=offsets[1], **masks,
    )  # fmt: skip
    assert loss.isfinite()
    gradients = torch.autograd.grad(loss, stages)
    for gradient in gradients:
        assert torch.equal(gradient.abs().sum(2) > 0, batch.student_mask)
    named = dict(views.named_parameters())
    plain = view_aligned_attention(
        stages, targets, *named.values(), num_heads=2, patchify="pool",
        attention_mask=batch.student_mask, student_offsets=offsets[0],
        teacher_offsets=offsets[1], **masks,
    )  # fmt: skip
    torch.testing.assert_close(plain, loss)


def test_end_of_text_is_in_no_span_and_masked_in_its_patch() -> None:
    both = BOTH["byte-300", "unigram"]
    ids = tokenizer("byte-300")("the day", add_special_tokens=False)["input_ids"]
    batch = align_batch([both.align_ids([*ids, 0, *ids])])
    assert batch.student_mask.tolist() == [[True] * len(ids) + [False] + [True] * len(ids)]
    student, _ = patch_offsets(batch, 100)
    assert student.tolist() == [[0, 2 * len(ids) + 1]]
    rows = paired_rows(batch, whole_token=False)
    assert rows[0, len(ids)] == (batch.teacher_ids[0] == 0).nonzero()[0, 0], (
        "eos predicts what follows"
    )
