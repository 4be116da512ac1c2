"""Spans: they partition text and ids, are as many as can be, and refuse what is not the text."""

from itertools import pairwise, product, takewhile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, processors

from deepfusion_kernels import Alignment, CrossTokenizer

from .made import ALPHABET, EOS, KINDS, PIECES, lower_casing, tokenizer, words, wrapped

PAIRS = [(one, other) for one, other in product(KINDS, KINDS) if one != other]
BOTH = {pair: CrossTokenizer(*map(tokenizer, pair)) for pair in PAIRS}
HARD = [
    "",
    " ",
    "\r\n",
    "a",
    " a",
    "a ",
    "  two  spaces  ",
    "unbelievable",
    "line\r\nline\n\nline\r",
    "👩\u200d🔬🙂🇳🇴",
    "cafe\u0301 café e\u0301\u0301",
    "漢字 and words",
    "\u00a0no\u00a0break",
    "don't stop...",
]
known_text = st.lists(
    st.sampled_from([*PIECES, *ALPHABET, " ", " ", "the ", "treatment", " costs"]), max_size=24
).map("".join)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def check(one: Alignment, student: Any, teacher: Any) -> None:
    """The spans are a partition of the text and of both sides, none of them empty."""
    assert one.student_ids == tuple(student(one.text, add_special_tokens=False)["input_ids"])
    assert one.teacher_ids == tuple(teacher(one.text, add_special_tokens=False)["input_ids"])
    counts = len(one.characters), len(one.student_spans), len(one.teacher_spans)
    assert len(set(counts)) == 1
    if not one.student_ids or not one.teacher_ids:
        assert counts[0] == 0
        assert not one.text.strip(), "only blanks can be without tokens"
        return
    for spans, length in (
        (one.characters, len(one.text)),
        (one.student_spans, len(one.student_ids)),
        (one.teacher_spans, len(one.teacher_ids)),
    ):
        assert spans[0][0] == 0
        assert spans[-1][1] == length
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert all(start < end for start, end in spans)


def offsets_of(text: str, side: Any) -> list[tuple[int, int]]:
    """Hugging Face's own offsets; a run of byte tokens, which share theirs, by character."""
    found = side(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = side.convert_ids_to_tokens(found["input_ids"]), list(found["offset_mapping"])
    is_byte = [token.startswith("<0x") for token in tokens]
    for n, first in enumerate(is_byte):
        if first and not (n and is_byte[n - 1]):
            run = list(takewhile(lambda k: is_byte[k], range(n, len(tokens))))
            started = -1
            for k in run:
                started += int(tokens[k][3:5], 16) & 0xC0 != 0x80
                offsets[k] = (offsets[n][0] + started, offsets[n][0] + started + 1)
    return offsets


def most_spans(text: str, *sides: Any) -> int:
    """The longest chain of places where both sides can be cut, from the tokenizers' own offsets."""
    cuts: list[dict[int, list[int]]] = []
    for side in sides:
        offsets = offsets_of(text, side)
        if not offsets:
            return 0
        found: dict[int, list[int]] = {}
        for before in range(1, len(offsets)):
            low = max(end for _, end in offsets[:before])
            high = min(start for start, _ in offsets[before:])
            for at in range(max(low, 1), min(high, len(text) - 1) + 1):
                found.setdefault(at, []).append(before)
        cuts.append(found)
    places = [
        (at, i, j)
        for at in sorted(cuts[0].keys() & cuts[1].keys())
        for i, j in product(cuts[0][at], cuts[1][at])
    ]
    longest: list[int] = []
    for at, i, j in places:
        before = [
            n for n, (c, a, b) in zip(longest, places, strict=False) if c < at and a < i and b < j
        ]
        longest.append(1 + max(before, default=0))
    return 1 + max(longest, default=0)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("text", HARD, ids=repr)
def test_hard_texts_are_partitioned_with_the_most_spans(pair: tuple[str, str], text: str) -> None:
    one = BOTH[pair].align(text)
    check(one, *map(tokenizer, pair))
    assert len(one.characters) == most_spans(text, *map(tokenizer, pair))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PAIRS), known_text)
def test_known_text_is_partitioned_with_the_most_spans(pair: tuple[str, str], text: str) -> None:
    one = BOTH[pair].align(text)
    check(one, *map(tokenizer, pair))
    assert len(one.characters) == most_spans(text, *map(tokenizer, pair))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([p for p in PAIRS if "wordpiece" not in p]), any_text)
def test_any_text_is_partitioned_where_all_bytes_are_known(
    pair: tuple[str, str], text: str
) -> None:
    if EOS not in text:
        one = BOTH[pair].align(text)
        check(one, *map(tokenizer, pair))
        assert len(one.characters) == most_spans(text, *map(tokenizer, pair))


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(KINDS), known_text)
def test_a_tokenizer_meets_itself_at_every_character_boundary(kind: str, text: str) -> None:
    one = CrossTokenizer(tokenizer(kind), tokenizer(kind)).align(text)
    assert one.student_spans == one.teacher_spans
    ends = [0]
    for start, end in offsets_of(text, tokenizer(kind)):
        # a token that starts before the last one ended shares a character with it
        ends = [*ends, end] if start >= ends[-1] else [*ends[:-1], max(end, ends[-1])]
    assert len(one.characters) == len([end for end in ends if end])


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_spans_of_real_words_are_finer_than_words(pair: tuple[str, str]) -> None:
    text = words()[0]
    one = BOTH[pair].align(text)
    assert len(one.characters) >= len(text.split())
    assert "".join(text[a:b] for a, b in one.characters) == text


def test_characters_are_never_parted() -> None:
    one = BOTH["byte-300", "unigram"].align("a🙂b")
    assert [one.text[a:b] for a, b in one.characters] == ["a", "🙂", "b"]
    assert one.student_spans[1][1] - one.student_spans[1][0] == 4, "an emoji is four bytes"


@pytest.mark.parametrize(
    ("text", "side", "character"),
    [("fine words, Then", "lower", 12), ("漢 fine 語", "wordpiece", 7)],
)
def test_lossy_round_trip_is_refused_with_side_and_place(
    text: str, side: str, character: int
) -> None:
    lossy = lower_casing() if side == "lower" else tokenizer(side)
    wanted = rf"the teacher's tokens spell, got .* from character {character} of {len(text)} on"
    with pytest.raises(ValueError, match=wanted):
        CrossTokenizer(tokenizer("byte-600"), lossy).align(text)
    with pytest.raises(ValueError, match="the student's tokens"):
        CrossTokenizer(lossy, tokenizer("byte-600")).align(text)


def test_text_that_is_a_special_token_is_refused() -> None:
    with pytest.raises(ValueError, match="got id 0, which spells nothing, from character 2 of 6"):
        BOTH["byte-300", "unigram"].align("x </s>")


def test_normalisation_is_refused_and_normalised_text_is_not() -> None:
    backend = tokenizer("byte-300").backend_tokenizer
    composing = type(backend).from_str(backend.to_str())
    composing.normalizer = normalizers.NFC()
    both = CrossTokenizer(tokenizer("byte-600"), wrapped(composing))
    assert both.align("café").characters
    with pytest.raises(ValueError, match="another text from character 3 of 5 on; normalise"):
        both.align("cafe\u0301")


def test_other_tokenizers_are_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    by_word = Tokenizer(models.WordLevel({EOS: 0, "a": 1}, unk_token=EOS))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match=r"teacher must be byte-level BPE, .* got a WordLevel"):
        CrossTokenizer(tokenizer("byte-300"), wrapped(by_word))
    with pytest.raises(ValueError, match="student must be a fast Hugging Face tokenizer, got str"):
        CrossTokenizer("gpt2", tokenizer("byte-300"))


def test_special_tokens_lie_in_no_span() -> None:
    backend = tokenizer("unigram").backend_tokenizer
    templated = type(backend).from_str(backend.to_str())
    templated.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A {EOS}", special_tokens=[(EOS, 0)]
    )
    student = tokenizer("byte-300")
    one = CrossTokenizer(student, wrapped(templated), special_tokens=True).align("the day")
    bare = CrossTokenizer(student, tokenizer("unigram")).align("the day")
    assert one.teacher_ids == (0, *bare.teacher_ids, 0)
    assert one.teacher_spans == tuple((a + 1, b + 1) for a, b in bare.teacher_spans)
    assert one.student_ids == bare.student_ids
    assert one.student_spans == bare.student_spans


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_ids_in_parts_are_aligned_text_by_text(pair: tuple[str, str]) -> None:
    student = tokenizer(pair[0])
    texts = ["the first text", "and another"]
    parts = [student(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids = [*parts[0], 0, *parts[1], 0]
    one = BOTH[pair].align_ids(ids)
    alone = [BOTH[pair].align(text) for text in texts]
    assert one.text == "".join(texts)
    assert one.student_ids == tuple(ids)
    assert one.teacher_ids == (*alone[0].teacher_ids, 0, *alone[1].teacher_ids, 0)
    shifts = len(parts[0]) + 1, len(alone[0].teacher_ids) + 1
    moved = [(a + shifts[0], b + shifts[0]) for a, b in alone[1].student_spans]
    assert one.student_spans == (*alone[0].student_spans, *moved)
    moved = [(a + shifts[1], b + shifts[1]) for a, b in alone[1].teacher_spans]
    assert one.teacher_spans == (*alone[0].teacher_spans, *moved)


def test_ids_that_part_a_character_leave_it_out() -> None:
    both = BOTH["byte-300", "unigram"]
    ids = tokenizer("byte-300")("🙂 day 🙂", add_special_tokens=False)["input_ids"]
    one = both.align_ids(ids[2:-2])
    assert one.text.strip() == "day"
    assert one.student_spans[0][0] == 2
    assert one.student_spans[-1][1] < len(ids) - 4
    with pytest.raises(ValueError, match="student ids must spell UTF-8"):
        both.align_ids([*ids[:2], *ids[4:]])
    with pytest.raises(ValueError, match="got id 1, which spells nothing, at place 1"):
        BOTH["wordpiece", "unigram"].align_ids([2, 1])


def test_alignments_are_kept() -> None:
    both = CrossTokenizer(tokenizer("byte-300"), tokenizer("unigram"), cache_size=2)
    first = both.align("one")
    assert both.align("one") is first
    both.align("two")
    both.align("three")
    assert both.align("one") is not first
    assert both.align("one") == first
    with pytest.raises(ValueError, match="cache_size must be >= 0"):
        CrossTokenizer(tokenizer("byte-300"), tokenizer("unigram"), cache_size=-1)
