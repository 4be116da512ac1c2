"""A text under the tokenizers of a student and a teacher, cut into the spans they share.

text = span_1 span_2 ... span_C        span_c = whole tokens of the student = of the teacher
C is the largest number possible; every span holds a character and a token of either side
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

from ..checks import expect_that
from .spans import Spelling, common_cuts, cuts_of, is_boundary, place
from .surfaces import OP, Surfaces
from .vocabulary import vocabulary_map

Span = tuple[int, int]


@dataclass(frozen=True)
class Alignment:
    """One text: ids of both sides and its C spans, as [start, end) of characters and of tokens.

    Special tokens lie in no span. A text that one side has no token for has no span.
    """

    text: str
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    characters: tuple[Span, ...]
    student_spans: tuple[Span, ...]
    teacher_spans: tuple[Span, ...]


class CrossTokenizer:
    """Aligns texts under two fast Hugging Face tokenizers: byte BPE, SentencePiece, WordPiece.

    >>> both = CrossTokenizer(student_tokenizer, teacher_tokenizer)
    >>> both.align("unbelievable").student_spans

    special_tokens: ids carry the special tokens that each tokenizer puts around a text. The latest
    `cache_size` alignments are kept. Raises ValueError for tokenizers of another kind, and for a
    text that a side's tokens do not spell (unknown tokens, lower-casing, normalisation): alignment
    by characters would be a guess there. Blanks that a side drops are allowed.
    Source: arXiv 2503.20083, section 3 (the cut at common ends of tokens).
    """

    def __init__(
        self, student: Any, teacher: Any, *, special_tokens: bool = False, cache_size: int = 4096
    ) -> None:
        expect_that(cache_size >= 0, OP, "cache_size", ">= 0", cache_size)
        self.student = Surfaces(student, "student")
        self.teacher = Surfaces(teacher, "teacher")
        self.special_tokens = special_tokens
        self.cache_size = cache_size
        self._cache: OrderedDict[Hashable, Alignment] = OrderedDict()

    def align(self, text: str) -> Alignment:
        """Tokenize a text on both sides and cut it; spans partition the text and both sides' ids.

        Raises ValueError naming the side and the character where its tokens leave the text.
        """
        return self._cached(text, lambda: self._align(text))

    def align_ids(self, student_ids: Sequence[int]) -> Alignment:
        """The alignment of ids that the student was given; special ids part them into texts.

        An end-of-text between texts is the teacher's end-of-text on its side, other special ids
        have no counterpart. Tokens that hold parts of characters at the ends of a text are left out
        of the spans. Raises ValueError for ids that spell nothing.
        """
        ids = tuple(int(one) for one in student_ids)
        return self._cached(ids, lambda: self._align_ids(ids))

    def vocabulary_map(self, unmatched: str = "none") -> Tensor:
        """[V_t] int64: the student's id of every teacher id, -1 for none; see `vocabulary.py`."""
        return vocabulary_map(self.student, self.teacher, unmatched)

    def _cached(self, key: Hashable, make: Callable[[], Alignment]) -> Alignment:
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        made = make()
        self._cache[key] = made
        if len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return made

    def _align(self, text: str) -> Alignment:
        student_ids, teacher_ids = self.student.encode(text), self.teacher.encode(text)
        characters, ours, theirs = self._cut(text, student_ids, teacher_ids)
        whole, before = self._with_specials(self.student, text, student_ids)
        teacher_whole, teacher_before = self._with_specials(self.teacher, text, teacher_ids)
        return Alignment(
            text,
            whole,
            teacher_whole,
            tuple(characters),
            _moved(ours, before),
            _moved(theirs, teacher_before),
        )

    def _with_specials(
        self, side: Surfaces, text: str, inner: list[int]
    ) -> tuple[tuple[int, ...], int]:
        """The ids a model reads, and how many stand before the text's own."""
        if not self.special_tokens:
            return tuple(inner), 0
        whole = list(side.tokenizer(text, add_special_tokens=True)["input_ids"])
        return tuple(whole), _find(inner, whole)

    def _align_ids(self, ids: tuple[int, ...]) -> Alignment:
        texts: list[str] = []
        teacher_ids: list[int] = []
        characters: list[Span] = []
        student_spans: list[Span] = []
        teacher_spans: list[Span] = []
        start = 0
        for end in (*(n for n, one in enumerate(ids) if one in self.student.specials), len(ids)):
            first, last, text = _whole_characters(self.student, ids[start:end])
            inner = self.teacher.encode(text)
            cut, ours, theirs = self._cut(text, list(ids[start + first : start + last]), inner)
            characters += _moved(cut, sum(map(len, texts)))
            student_spans += _moved(ours, start + first)
            teacher_spans += _moved(theirs, len(teacher_ids))
            texts.append(text)
            teacher_ids += inner
            eos = self.teacher.tokenizer.eos_token_id
            if (
                end < len(ids)
                and ids[end] == self.student.tokenizer.eos_token_id
                and eos is not None
            ):
                teacher_ids.append(eos)
            start = end + 1
        return Alignment(
            "".join(texts),
            ids,
            tuple(teacher_ids),
            tuple(characters),
            tuple(student_spans),
            tuple(teacher_spans),
        )

    def _cut(
        self, text: str, student_ids: list[int], teacher_ids: list[int]
    ) -> tuple[list[Span], list[Span], list[Span]]:
        """Spans of one text without special tokens: of characters, of either side's tokens."""
        data = text.encode()
        sides = ((self.student, student_ids), (self.teacher, teacher_ids))
        ours_at, theirs_at = (_placed(side, ids, data) for side, ids in sides)
        if not ours_at or not theirs_at:
            return [], [], []
        met = common_cuts(cuts_of(ours_at, data), cuts_of(theirs_at, data), len(data))
        bytes_of = (data[a:b] for a, b in pairwise([0, *(at for at, _, _ in met), len(data)]))
        marks = [
            [0, *accumulate(len(one.decode()) for one in bytes_of)],
            [0, *(cut.before for _, cut, _ in met), len(student_ids)],
            [0, *(cut.before for _, _, cut in met), len(teacher_ids)],
        ]
        characters, ours, theirs = (list(pairwise(one)) for one in marks)
        return characters, ours, theirs


def _placed(side: Surfaces, ids: Sequence[int], data: bytes) -> list[Span]:
    surfaces = [side.spelt[one] for one in ids]
    try:
        return place(surfaces, data)
    except Spelling as error:
        nothing = error.token < len(ids) and surfaces[error.token] is None
        what = f"id {ids[error.token]}, which spells nothing," if nothing else "another text"
        at = len(data[: error.at].decode(errors="ignore"))
        raise ValueError(
            f"{OP}: text must be what the {side.side}'s tokens spell, got {what} from character "
            f"{at} of {len(data.decode())} on; normalise the text as the tokenizer does, or leave "
            "it out"
        ) from None


def _find(inner: list[int], whole: list[int]) -> int:
    """How many special tokens stand before the text."""
    for shift in range(len(whole) - len(inner) + 1):
        if whole[shift : shift + len(inner)] == inner:
            return shift
    raise ValueError(
        f"{OP}: special tokens must stand around a text, got {len(whole)} ids that do not hold the "
        f"text's {len(inner)}"
    )


def _moved(spans: Sequence[Span], shift: int) -> tuple[Span, ...]:
    return tuple((start + shift, end + shift) for start, end in spans)


def _whole_characters(side: Surfaces, ids: Sequence[int]) -> tuple[int, int, str]:
    """[first, last) of the ids between which no character is parted, and their text."""
    first, last = 0, len(ids)
    while first < last and not is_boundary(side.spelt[ids[first]] or b" ", 0):
        first += 1
    while True:
        data = side.joined(ids[first:last])
        try:
            return first, last, data.decode()
        except UnicodeDecodeError as error:
            # bytes that only lack their rest are the last character, cut off
            if error.reason != "unexpected end of data":
                raise ValueError(
                    f"{OP}: {side.side} ids must spell UTF-8, got other bytes from byte "
                    f"{error.start} on"
                ) from None
            last -= 1
