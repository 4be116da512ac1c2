"""Packing loses nothing but the tail; batches depend on seed and step alone."""

import pytest
import torch

from deepfusion.data import batches
from deepfusion.data.batches import Packed, pack, pack_tokens, rows, stream, tokenize
from deepfusion.data.documents import CorpusError, Document


class Letters:
    """One token a letter: a = 1."""

    eos_token_id = 0

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) - 96 for letter in one] for one in text]}


def documents(*lengths: int) -> list[Document]:
    """Document n is its own letter, `lengths[n]` times; domains take turns."""
    return [
        Document(chr(97 + n) * length, f"s{n}", ("law", "art")[n % 2], "t")
        for n, length in enumerate(lengths)
    ]


def test_tokenize_ends_every_document() -> None:
    tokens = tokenize(documents(3, 1), Letters())
    assert tokens.ids.tolist() == [1, 1, 1, 0, 2, 0]
    assert tokens.offsets.tolist() == [0, 4, 6]


def test_tokenize_in_pieces_is_tokenize_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokenize(documents(5, 2, 7, 1, 4), Letters())
    monkeypatch.setattr(batches, "_TEXTS_AT_ONCE", 2)
    pieces = tokenize(documents(5, 2, 7, 1, 4), Letters())
    assert torch.equal(whole.ids, pieces.ids)
    assert torch.equal(whole.offsets, pieces.offsets)


def test_pack_is_the_shuffled_text_without_its_tail() -> None:
    given = documents(5, 2, 7, 1, 4, 9)
    packed = pack(given, Letters(), 6, 7)
    assert packed.ids.shape == (5, 6)
    flat = packed.ids.flatten().tolist()
    runs = [run for run in "".join(chr(96 + i) for i in flat).split("`") if run]
    # every document but the last is whole, none comes twice
    assert all(run in {one.text for one in given} for run in runs[:-1])
    assert len(set(runs)) == len(runs)
    assert torch.equal(packed.ids, pack(given, Letters(), 6, 7).ids)
    assert not torch.equal(packed.ids, pack(given, Letters(), 6, 8).ids)


def test_document_and_domain_are_those_of_most_tokens() -> None:
    given = documents(5, 2, 7, 1, 4, 9)
    packed = pack(given, Letters(), 6, 7)
    assert packed.domains == ("art", "law")
    for sequence, document, domain in zip(packed.ids, packed.document, packed.domain, strict=True):
        owner = given[int(document)]
        assert packed.domains[int(domain)] == owner.domain
        count = (sequence == ord(owner.text[0]) - 96).sum()
        # its own end of text counts for it too
        assert all((sequence == letter).sum() <= count + 1 for letter in range(1, 7))


def test_copies_repeat_every_document_among_other_neighbours() -> None:
    given = documents(5, 2, 7, 1, 4, 9)
    tokens = tokenize(given, Letters())
    once, thrice = (pack_tokens(given, tokens, 34, 7, copies) for copies in (1, 3))
    assert len(thrice) == 3 * len(once) == 3
    assert torch.equal(thrice.ids[0], once.ids[0])
    assert len({tuple(sequence.tolist()) for sequence in thrice.ids}) == 3
    assert all(torch.equal(s.sort().values, once.ids[0].sort().values) for s in thrice.ids)


def test_too_little_text_is_refused_without_its_words() -> None:
    with pytest.raises(CorpusError, match="fill one sequence of 9 tokens, got 4 tokens in 1 doc"):
        pack(documents(3), Letters(), 9, 7)


def test_every_epoch_has_every_sequence_once_in_a_new_order() -> None:
    drawn = torch.cat(list(rows(10, 4, 10, 7)))
    epochs = drawn.view(4, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_sequences", [3, 10])
def test_a_stream_goes_on_at_any_step(weighted: bool, num_sequences: int) -> None:
    weights = torch.arange(num_sequences).float() if weighted else None
    whole = list(rows(num_sequences, 4, 9, 7, weights=weights))
    for start in (0, 1, 5, 9):
        rest = list(rows(num_sequences, 4, 9, 7, weights=weights, start=start))
        assert len(rest) == 9 - start
        assert all(map(torch.equal, rest, whole[start:]))
    other = list(rows(num_sequences, 4, 9, 8, weights=weights))
    assert not all(map(torch.equal, other, whole))


def test_weights_are_followed() -> None:
    weights = torch.tensor([0.0, 1.0, 3.0])
    counts = torch.cat(list(rows(3, 50, 80, 7, weights=weights))).bincount(minlength=3)
    assert counts[0] == 0
    # 4,000 draws at 1/4: three standard deviations are 82
    assert abs(int(counts[1]) - 1000) < 82


def test_stream_gives_the_sequences_of_rows() -> None:
    packed = Packed(torch.arange(30).view(10, 3), torch.zeros(10), torch.zeros(10), ("law",))
    for chosen, batch in zip(rows(10, 4, 5, 7), stream(packed, 4, 5, 7), strict=True):
        assert torch.equal(batch, packed.ids[chosen])
    assert len(packed.take(torch.tensor([4, 2]))) == 2


def test_no_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="num_sequences and batch_size must be >= 1, got 0, 4"):
        next(rows(0, 4, 1, 7))
