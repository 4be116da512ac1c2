"""The scoreboard: one row a model, limits, and what is not computed twice."""

import json
from typing import Any

import pytest
from torch import nn

from deepfusion.config_tables import EvaluateConfig
from deepfusion.data.made import Fact
from deepfusion.server.evaluate import evaluate
from deepfusion.server.scoreboard import Entry, score_models

from .test_evaluate import by_domain, mixture
from .tiny import LENGTH, tiny


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        spans = [(i, i + 1) for i in range(len(text))]
        return {"input_ids": [ord(one) % 61 for one in text], "offset_mapping": spans}


def fact(domain: str, choices: int) -> Fact:
    return Fact("a?", " b", domain, "topic", "source", choices)


def refuse() -> nn.Module:
    raise AssertionError("loaded a model whose scores are known")


def board(entries: list[Entry], facts: list[Fact], **options: Any) -> dict[str, Any]:
    config = EvaluateConfig(batch_size=4, **options)
    found = score_models(entries, by_domain(), facts, Letters(), config)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def test_rows_are_the_scores_of_evaluate() -> None:
    found = board([Entry("base", "base", lambda: tiny("qwen2"))], [])
    scores = evaluate(tiny("qwen2"), by_domain(), 4)
    assert found["order"] == ["base"]
    assert found["models"]["base"]["nll"] == pytest.approx(scores["all"].nll)
    assert found["models"]["base"]["domains"]["domain-1"]["nll"] == pytest.approx(
        scores["domain-1"].nll
    )
    assert found["tokens"] == scores["all"].tokens
    assert found["models"]["base"]["fact_recall"] is None
    assert "fact_chance" not in found


def test_same_weights_are_scored_once() -> None:
    entries = [
        Entry("device-00", "device", lambda: tiny("gpt2")),
        Entry("proxy 0", "proxy", refuse, same_as="device-00"),
    ]
    models = board(entries, [fact("domain-0", 4)])["models"]
    assert models["proxy 0"] == models["device-00"] | {"kind": "proxy"}


def test_token_limit_takes_whole_sequences_of_every_domain() -> None:
    found = board([Entry("moe", "moe", mixture)], [], max_tokens=2 * LENGTH + 5)
    assert found["tokens"] == 3 * 2 * (LENGTH - 1)
    assert set(found["expert_load"]) == set(by_domain())


def test_chance_is_the_mean_over_facts() -> None:
    facts = [fact("domain-0", 4), fact("domain-0", 4), fact("domain-1", 10)]
    found = board([Entry("base", "base", lambda: tiny("qwen2"))], facts)
    assert found["fact_chance"] == pytest.approx((0.25 + 0.25 + 0.1) / 3)
    assert set(found["models"]["base"]["fact_recall"]) == {"all", "domain-0", "domain-1"}
