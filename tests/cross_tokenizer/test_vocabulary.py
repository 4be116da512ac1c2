"""Vocabularies: equal bytes meet however they are marked; the rest meets nobody, or the nearest."""

from itertools import product
from typing import Any

import numpy as np
import pytest

from deepfusion_kernels import CrossTokenizer
from deepfusion_kernels.cross_tokenizer.vocabulary import _distances

from .made import KINDS, tokenizer


def spelt(side: Any, token_id: int) -> bytes:
    return side.spelt[token_id] or b""


@pytest.mark.parametrize("pair", list(product(KINDS, KINDS)), ids="-".join)
def test_mapped_tokens_spell_the_same(pair: tuple[str, str]) -> None:
    both = CrossTokenizer(*map(tokenizer, pair))
    found = both.vocabulary_map()
    assert found.shape == (len(tokenizer(pair[1])),)
    assert found[0] == 0, "end of text meets end of text"
    matched = 0
    loose = "wordpiece" in pair
    for theirs, ours in enumerate(found.tolist()):
        one, other = (
            spelt(both.teacher, theirs), spelt(both.student, ours) if ours >= 0 else None,
        )  # fmt: skip
        if other is not None and theirs:
            matched += 1
            assert (one.strip(b" ") == other.strip(b" ")) if loose else (one == other)
    known = {spelt(both.student, n) for n in range(len(both.student.spelt))} - {b""}
    for theirs, ours in enumerate(found.tolist()):
        if not loose and theirs and spelt(both.teacher, theirs) in known:
            assert ours >= 0
    assert matched > 60
    if pair[0] == pair[1] and not loose:
        kept = [n for n in range(len(found)) if spelt(both.teacher, n)]
        assert all(spelt(both.student, int(found[n])) == spelt(both.student, n) for n in kept)


def test_leading_spaces_meet_however_they_are_marked() -> None:
    for one, other in product(KINDS, KINDS):
        both = CrossTokenizer(tokenizer(one), tokenizer(other))
        ids = [side.encode("of the")[-1] for side in (both.student, both.teacher)]
        words = [spelt(side, n) for side, n in zip((both.student, both.teacher), ids, strict=True)]
        if words[0].strip() == words[1].strip() == b"the":
            assert both.vocabulary_map()[ids[1]] == ids[0], (one, other)


def test_unmatched_tokens_meet_nobody_or_the_nearest() -> None:
    both = CrossTokenizer(tokenizer("byte-300"), tokenizer("byte-600"))
    bare, full = both.vocabulary_map(), both.vocabulary_map("min_edit")
    missing = (bare < 0).nonzero()[:, 0].tolist()
    assert missing
    assert (full >= 0).all()
    assert (full[bare >= 0] == bare[bare >= 0]).all()
    candidates = [spelt(both.student, n) for n in range(len(both.student.spelt))]
    for theirs in missing[::7]:
        key = spelt(both.teacher, theirs)
        best = min(levenshtein(key, one) for one in candidates if one)
        assert levenshtein(key, candidates[int(full[theirs])]) == best
    with pytest.raises(ValueError, match="unmatched must be one of 'none', 'min_edit'"):
        both.vocabulary_map("nearest")


def levenshtein(one: bytes, other: bytes) -> int:
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row, before = [i], row
        for j, b in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def test_distances_are_levenshtein() -> None:
    words = [b"kitten", b"sittin", b"xxxxxx", b"abcdef"]
    rows = np.frombuffer(b"".join(words), np.uint8).reshape(4, 6)
    for key in (b"sitting", b"kit", b"", b"fedcba"):
        assert _distances(key, rows).tolist() == [levenshtein(key, one) for one in words]
