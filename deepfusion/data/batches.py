"""From documents to batches of token ids.

tokens      d_1 eos d_2 eos d_3 eos ...        documents in an order drawn from the seed
sequences   [S, L]: that stream cut every L tokens; the rest below L is left out
batch i     B sequences; depends on (seed, i) alone, so that a stream goes on at any step
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..seeding import generator
from .documents import CorpusError, Document

_TEXTS_AT_ONCE = 1000  # bounds the lists of ids in memory; unmeasured


class Tokenizer(Protocol):
    """What packing needs of a transformers tokenizer."""

    eos_token_id: int

    def __call__(
        self, text: list[str], *, add_special_tokens: bool
    ) -> Mapping[str, list[list[int]]]: ...


@dataclass(frozen=True)
class Tokens:
    """All tokens in one row: ids [T] int64; offsets [N + 1] int64, document n at offsets[n:n+2]."""

    ids: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class Packed:
    """Sequences of equal length: ids [S, L] int64, document [S] and domain [S] int64.

    `document` is the index of the document that holds most of the sequence's tokens, `domain` the
    index of that document's domain in `domains`.
    """

    ids: Tensor
    document: Tensor
    domain: Tensor
    domains: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def take(self, rows: Tensor) -> "Packed":
        """The sequences of the given indices (or boolean mask)."""
        return Packed(self.ids[rows], self.document[rows], self.domain[rows], self.domains)


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> Tokens:
    """Every document's ids followed by eos, in the order given."""
    ids: list[int] = []
    offsets = [0]
    for start in range(0, len(documents), _TEXTS_AT_ONCE):
        texts = [document.text for document in documents[start : start + _TEXTS_AT_ONCE]]
        for row in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            ids += row
            ids.append(tokenizer.eos_token_id)
            offsets.append(len(ids))
    return Tokens(torch.tensor(ids, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int64))


def pack(
    documents: Sequence[Document], tokenizer: Tokenizer, context_length: int, seed: int
) -> Packed:
    """Documents, shuffled and joined by eos, as full sequences.

    Raises CorpusError where all documents together are shorter than one sequence.
    """
    return pack_tokens(documents, tokenize(documents, tokenizer), context_length, seed)


def pack_tokens(
    documents: Sequence[Document],
    tokens: Tokens,
    context_length: int,
    seed: int,
    copies: int = 1,
) -> Packed:
    """`pack` of documents that are tokenized already.

    With `copies` every document comes that often, each time among other neighbours: a small shard
    is learnt by its facts, not by its places.
    """
    draw = generator(seed, "pack")
    order = torch.cat([torch.randperm(len(documents), generator=draw) for _ in range(copies)])
    lengths = tokens.offsets.diff()
    pieces = torch.split(tokens.ids, lengths.tolist())
    ids = torch.cat([pieces[n] for n in order.tolist()])
    num_sequences = ids.numel() // context_length
    if num_sequences == 0:
        raise CorpusError(
            f"pack: text must fill one sequence of {context_length} tokens, got "
            f"{ids.numel()} tokens in {len(documents)} documents"
        )
    offsets = F.pad(lengths[order].cumsum(0), (1, 0))
    document = order[_dominant(offsets, num_sequences, context_length)]
    domains = tuple(sorted({one.domain for one in documents}))
    of_document = torch.tensor([domains.index(one.domain) for one in documents])
    ids = ids[: num_sequences * context_length].view(num_sequences, context_length)
    return Packed(ids, document, of_document[document], domains)


def _dominant(offsets: Tensor, num_sequences: int, context_length: int) -> Tensor:
    """For each sequence the place of the document with most of its tokens (the first, if equal)."""
    share, place = [0] * num_sequences, [0] * num_sequences
    for n, (start, end) in enumerate(pairwise(offsets.tolist())):
        for s in range(start // context_length, min(-(-end // context_length), num_sequences)):
            overlap = min(end, (s + 1) * context_length) - max(start, s * context_length)
            if overlap > share[s]:
                share[s], place[s] = overlap, n
    return torch.tensor(place)


def rows(
    num_sequences: int,
    batch_size: int,
    steps: int,
    seed: int,
    *,
    weights: Tensor | None = None,
    start: int = 0,
) -> Iterator[Tensor]:
    """The sequence indices [B] int64 of the batches of steps start, start + 1, ..., steps - 1.

    Without weights every sequence comes once before any comes again, in a new order each time.
    With weights [S] (not negative, not all zero) indices are drawn in proportion, with repetition.
    """
    if num_sequences < 1 or batch_size < 1:
        raise ValueError(
            f"rows: num_sequences and batch_size must be >= 1, got {num_sequences}, {batch_size}"
        )
    orders: dict[int, Tensor] = {}
    for step in range(start, steps):
        if weights is not None:
            draw = generator(seed, "weighted", step)
            yield torch.multinomial(weights, batch_size, replacement=True, generator=draw)
            continue
        places = torch.arange(step * batch_size, (step + 1) * batch_size)
        epochs = places // num_sequences
        wanted = range(int(epochs[0]), int(epochs[-1]) + 1)
        orders = {
            epoch: orders[epoch]
            if epoch in orders
            else torch.randperm(num_sequences, generator=generator(seed, "epoch", epoch))
            for epoch in wanted
        }
        yield torch.stack(
            [orders[int(e)][int(p) % num_sequences] for e, p in zip(epochs, places, strict=True)]
        )


def stream(
    packed: Packed,
    batch_size: int,
    steps: int,
    seed: int,
    *,
    weights: Tensor | None = None,
    start: int = 0,
) -> Iterator[Tensor]:
    """The batches [B, L] int64 of `rows`."""
    for chosen in rows(len(packed), batch_size, steps, seed, weights=weights, start=start):
        yield packed.ids[chosen]
