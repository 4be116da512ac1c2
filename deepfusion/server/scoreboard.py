"""Every model of a run against the same text and the same facts: what evaluation.json holds.

    models[name] = {kind, parameters, domains: {domain: score}, fact_recall: {all, domain: share}}
    fact_chance  = mean over facts of 1 / values the fact could have

Facts are those that the devices' private text states; a share is of the facts of a domain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..config_tables import EvaluateConfig
from ..data.batches import Packed
from ..data.made import Fact
from ..metrics import progress
from .evaluate import Tokenizer, evaluate, fact_recall
from .routing_facts import expert_load


@dataclass(frozen=True)
class Entry:
    """One model to score; `load` makes it when its turn comes: one is in memory at a time.

    same_as: an earlier entry with the same weights, whose scores it takes over.
    """

    name: str
    kind: str
    load: Callable[[], nn.Module]
    same_as: str = ""


def score_models(
    entries: Sequence[Entry],
    text: Mapping[str, Packed],
    facts: Sequence[Fact],
    tokenizer: Tokenizer,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Scores by model; the mixture (kind "moe") also gives its expert load and router entropy."""
    result: dict[str, Any] = {"models": {}, "order": [entry.name for entry in entries]}
    text = {name: _first(packed, config.max_tokens) for name, packed in text.items()}
    for entry in progress(entries, "evaluate"):
        if entry.same_as:
            result["models"][entry.name] = result["models"][entry.same_as] | {"kind": entry.kind}
            continue
        model = entry.load()
        scores = evaluate(model, text, config.batch_size)
        result["models"][entry.name] = {
            "kind": entry.kind,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "nll": scores.pop("all").nll,
            "domains": {domain: asdict(score) for domain, score in scores.items()},
            "fact_recall": recall_by_domain(model, tokenizer, facts) if facts else None,
        }
        result["tokens"] = sum(score.tokens for score in scores.values())
        if entry.kind == "moe":
            routing = expert_load(model, text, config.batch_size)
            result["expert_load"] = {d: one.load.tolist() for d, one in routing.items()}
            result["router_entropy"] = {d: float(one.entropy.mean()) for d, one in routing.items()}
    if facts:
        result["fact_chance"] = sum(1 / fact.choices for fact in facts) / len(facts)
    return result


def _first(packed: Packed, max_tokens: int) -> Packed:
    """Whole sequences up to so many tokens; 0: all."""
    if not max_tokens:
        return packed
    kept = max(1, max_tokens // packed.ids.shape[1])
    return packed.take(torch.arange(min(kept, len(packed))))


def recall_by_domain(
    model: nn.Module, tokenizer: Tokenizer, facts: Sequence[Fact]
) -> dict[str, float]:
    """Share of facts completed exactly: under "all", and of every domain."""
    known = fact_recall(model, tokenizer, facts)
    shares = {"all": _share(known)}
    for domain in dict.fromkeys(fact.domain for fact in facts):
        shares[domain] = _share(
            hit for hit, fact in zip(known, facts, strict=True) if fact.domain == domain
        )
    return shares


def _share(hits: Iterable[bool]) -> float:
    listed = list(hits)
    return sum(listed) / len(listed)
