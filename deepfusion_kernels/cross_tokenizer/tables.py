"""Alignments as tensors: padded ids, spans, rows that stand at one place, patches of features.

row r of a side predicts its token r + 1; a span that starts at tokens (i, j) pairs rows i-1, j-1
patch = the fewest whole spans that hold at least p tokens of the student
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import expect_that
from .aligner import Alignment, Span

OP = "align_batch"


class AlignedBatch(NamedTuple):
    """B texts: ids [B, L_s], [B, L_t] int64, masks [B, L] bool of the tokens that lie in a span,
    spans [B, C, 2] int64 as [start, end) of tokens; a text's missing spans are (L, L): empty."""

    student_ids: Tensor
    teacher_ids: Tensor
    student_mask: Tensor
    teacher_mask: Tensor
    student_spans: Tensor
    teacher_spans: Tensor

    def to(self, device: torch.device | str) -> AlignedBatch:
        """The same tables on a device."""
        return AlignedBatch(*(one.to(device) for one in self))


def align_batch(
    alignments: Sequence[Alignment],
    *,
    student_length: int | None = None,
    teacher_length: int | None = None,
    student_pad: int = 0,
    teacher_pad: int = 0,
) -> AlignedBatch:
    """Tables of B texts. Lengths cut a side's ids: a span that does not fit whole on both sides is
    left out, and so are those behind it. Without a length the longest text decides."""
    expect_that(len(alignments) > 0, OP, "alignments", "at least one", 0)
    lengths = []
    for name, given, ids in (
        ("student_length", student_length, [one.student_ids for one in alignments]),
        ("teacher_length", teacher_length, [one.teacher_ids for one in alignments]),
    ):
        expect_that(given is None or given >= 1, OP, name, ">= 1", given)
        lengths.append(max(map(len, ids)) if given is None else given)
    spans: list[list[tuple[Span, Span]]] = []
    for one in alignments:
        both = zip(one.student_spans, one.teacher_spans, strict=True)
        # ends rise on both sides: what fits is a prefix
        spans.append([(a, b) for a, b in both if a[1] <= lengths[0] and b[1] <= lengths[1]])
    count = max(map(len, spans))
    student_spans = _spans([[a for a, _ in row] for row in spans], count, lengths[0])
    teacher_spans = _spans([[b for _, b in row] for row in spans], count, lengths[1])
    return AlignedBatch(
        _ids([one.student_ids for one in alignments], lengths[0], student_pad),
        _ids([one.teacher_ids for one in alignments], lengths[1], teacher_pad),
        span_of_tokens(student_spans, lengths[0]) < count,
        span_of_tokens(teacher_spans, lengths[1]) < count,
        student_spans,
        teacher_spans,
    )


def _ids(rows: Sequence[Sequence[int]], length: int, pad: int) -> Tensor:
    return torch.tensor(
        [[*row[:length], *[pad] * (length - len(row))] for row in rows], dtype=torch.int64
    ).view(len(rows), length)


def _spans(rows: Sequence[Sequence[Span]], count: int, length: int) -> Tensor:
    padded = [[*row, *[(length, length)] * (count - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64).view(len(rows), count, 2)


def span_of_tokens(spans_BC2: Tensor, length: int) -> Tensor:
    """[B, L] int64: the span that holds each token, C for none. Starts must not fall."""
    B, C, _ = spans_BC2.shape
    tokens_BL = torch.arange(length, device=spans_BC2.device).expand(B, length).contiguous()
    if C == 0:
        return torch.zeros_like(tokens_BL)
    starts_BC, ends_BC = (one.contiguous() for one in spans_BC2.unbind(2))
    found_BL = torch.searchsorted(starts_BC, tokens_BL, right=True) - 1
    held_BL = tokens_BL < ends_BC.gather(1, found_BL.clamp(min=0))
    return torch.where((found_BL >= 0) & held_BL, found_BL, C)


def paired_rows(batch: AlignedBatch, *, whole_token: bool) -> Tensor:
    """[B, L_s] int64: the teacher's row at the place of each student's row, -1 where none is.

    whole_token: only where the tokens that follow spell the same characters on both sides (a
    boundary before and behind); else wherever both sides have a boundary.
    """
    starts = torch.stack([batch.student_spans[..., 0], batch.teacher_spans[..., 0]])
    ends = torch.stack([batch.student_spans[..., 1], batch.teacher_spans[..., 1]])
    # a first token has no row that predicts it
    counts_BC = ((ends > starts) & (starts > 0)).all(0)
    if whole_token:
        counts_BC &= (ends - starts == 1).all(0)
    texts, spans = counts_BC.nonzero(as_tuple=True)
    rows_BL = torch.full_like(batch.student_ids, -1)
    rows_BL[texts, starts[0, texts, spans] - 1] = starts[1, texts, spans] - 1
    return rows_BL


def patch_offsets(batch: AlignedBatch, patch_size: int) -> tuple[Tensor, Tensor]:
    """Tables [B, Q+1] int32 of both sides for `view_aligned_attention(patchify='pool')`.

    Patches hold the same characters on both sides, whole spans, at least patch_size student tokens
    (the last of a text may hold fewer). Special tokens inside a text lie in the patch before them:
    give the batch's masks as well. Source: docs/cross_tokenizer.md.
    """
    expect_that(patch_size >= 1, "patch_offsets", "patch_size", ">= 1", patch_size)
    tables: tuple[list[list[int]], list[list[int]]] = ([], [])
    both = zip(batch.student_spans.tolist(), batch.teacher_spans.tolist(), strict=True)
    for ours, theirs in both:
        spans = [pair for pair in zip(ours, theirs, strict=True) if pair[0][1] > pair[0][0]]
        firsts, held = [], patch_size
        for student, teacher in spans:
            if held >= patch_size:
                firsts.append((student[0], teacher[0]))
                held = 0
            held += student[1] - student[0]
        last = (spans[-1][0][1], spans[-1][1][1]) if spans else (0, 0)
        for side, table in enumerate(tables):
            table.append([*(one[side] for one in firsts), last[side]])
    count = max(map(len, tables[0]))
    student, teacher = (
        torch.tensor([[*row, *row[-1:] * (count - len(row))] for row in table], dtype=torch.int32)
        for table in tables
    )
    return student, teacher
