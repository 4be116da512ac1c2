"""What a model knows: per domain, per fact.

nll = mean over tokens of -ln P(x_t | x_<t)      perplexity = e^nll
accuracy = share of tokens that are the argmax
recall = share of facts whose every answer token is the argmax: greedy decoding completes them
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import Packed
from ..models import build

# logits of so many tokens at once: 4 MiB of float32 at V = 2048, 300 MiB at V = 152k
ROWS_AT_ONCE = 512


class Fact(Protocol):
    """A question with its only answer: prompt + answer is a stretch of text."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str: ...


class Tokenizer(Protocol):
    """What recall needs of a fast transformers tokenizer."""

    def __call__(
        self, text: str, *, return_offsets_mapping: bool, add_special_tokens: bool
    ) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class DomainScore:
    """Token-weighted scores of one text: nll in nats per token."""

    nll: float
    perplexity: float
    accuracy: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module, packed_by_domain: Mapping[str, Packed], batch_size: int
) -> dict[str, DomainScore]:
    """Scores of every domain and, under "all", of all their tokens together.

    The first token of a sequence is context only. Raises ValueError for a domain without a token
    to predict.
    """
    was_training = model.training
    model.eval()
    totals = {
        name: _totals(model, packed.ids, batch_size, name)
        for name, packed in packed_by_domain.items()
    }
    model.train(was_training)
    scores = {name: _score(*total) for name, total in totals.items()}
    scores["all"] = _score(*(sum(column) for column in zip(*totals.values(), strict=True)))
    return scores


def _totals(model: nn.Module, ids_SL: Tensor, batch_size: int, name: str) -> tuple[float, int, int]:
    if ids_SL.shape[0] == 0 or ids_SL.shape[1] < 2:
        raise ValueError(
            f"evaluate: domain {name!r} must hold [S > 0, L > 1] ids, got {list(ids_SL.shape)}"
        )
    nll, hits, tokens = 0.0, 0, 0
    for ids_BL in torch.split(ids_SL, batch_size):
        for logits_TV, labels_T in next_token_logits(model, ids_BL):
            losses_T = F.cross_entropy(logits_TV, labels_T, reduction="none")
            nll += float(losses_T.double().sum())
            hits += int((logits_TV.argmax(dim=-1) == labels_T).sum())
            tokens += labels_T.numel()
    return nll, hits, tokens


def next_token_logits(model: nn.Module, ids_BL: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Float32 logits of each next token with that token, a block of rows at a time."""
    weight_VD = build.head_weight(model)
    hidden_BLD = build.backbone(model)(ids_BL, use_cache=False).last_hidden_state
    hidden_TD = hidden_BLD[:, :-1].flatten(0, 1)
    labels_T = ids_BL[:, 1:].flatten()
    for hidden_rows, labels_rows in zip(
        torch.split(hidden_TD, ROWS_AT_ONCE), torch.split(labels_T, ROWS_AT_ONCE), strict=True
    ):
        yield F.linear(hidden_rows, weight_VD).float(), labels_rows


def _score(nll: float, hits: int, tokens: int) -> DomainScore:
    mean = nll / tokens
    # a diverged model is reported as such, not by an OverflowError
    return DomainScore(mean, math.exp(mean) if mean < 700 else math.inf, hits / tokens, tokens)


@torch.no_grad()
def fact_recall(
    model: nn.Module, tokenizer: Tokenizer, facts: Sequence[Fact], batch_size: int = 32
) -> list[bool]:
    """For each fact, whether greedy decoding from its prompt gives exactly its answer's tokens.

    One pass over prompt + answer decides it: the greedy path equals the answer if and only if every
    answer token is the argmax after the tokens before it. Of a text longer than the model's
    positions the beginning is left out; ValueError for an answer that alone is too long.
    """
    was_training = model.training
    model.eval()
    most = build.positions(model)
    rows = [_within(*_fact_ids(tokenizer, fact), most) for fact in facts]
    known: list[bool] = []
    for start in range(0, len(rows), batch_size):
        known += _known(model, rows[start : start + batch_size])
    model.train(was_training)
    return known


def _fact_ids(tokenizer: Tokenizer, fact: Fact) -> tuple[list[int], int]:
    """Tokens of prompt + answer as in running text, and the position of the first answer token."""
    text = fact.prompt + fact.answer
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ends = [end for _, end in encoded["offset_mapping"]]
    # a token that straddles the boundary belongs to the answer: it cannot be given away with the
    # prompt
    first = next((t for t, end in enumerate(ends) if end > len(fact.prompt)), len(ends))
    if not 0 < first < len(ends):
        raise ValueError(
            "fact_recall: every fact needs a prompt and an answer of at least one token"
        )
    return list(encoded["input_ids"]), first


def _within(ids: list[int], first: int, most: int) -> tuple[list[int], int]:
    """The last `most` tokens of a fact, one before the answer at the least."""
    cut = max(0, len(ids) - most)
    if first - cut < 1:
        raise ValueError(
            f"fact_recall: an answer must have fewer tokens than the model has positions = {most}, "
            f"got {len(ids) - first}; set data.context_length or data.vocab_size higher"
        )
    return ids[cut:], first - cut


def _known(model: nn.Module, rows: Sequence[tuple[list[int], int]]) -> list[bool]:
    length = max(len(ids) for ids, _ in rows)
    # right padding is invisible to a causal model: no position looks ahead
    padded_BL = torch.tensor([ids + [ids[-1]] * (length - len(ids)) for ids, _ in rows])
    weight_VD = build.head_weight(model)
    padded_BL = padded_BL.to(weight_VD.device)
    hidden_BLD = build.backbone(model)(padded_BL, use_cache=False).last_hidden_state
    known = []
    for b, (ids, first) in enumerate(rows):
        logits_TV = F.linear(hidden_BLD[b, first - 1 : len(ids) - 1], weight_VD)
        known.append(bool(torch.equal(logits_TV.argmax(-1), padded_BL[b, first : len(ids)])))
    return known
