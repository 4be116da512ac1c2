"""Scores, fact recall and routing facts against plain spellings of the same."""

import math
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from deepfusion.config_tables import MergeConfig
from deepfusion.models import build, experts
from deepfusion.server.evaluate import DomainScore, evaluate, fact_recall
from deepfusion.server.merge import merge
from deepfusion.server.router import RouterTap, balance_loss, supervision_loss
from deepfusion.server.routing_facts import expert_load

from .tiny import LENGTH, VOCAB, logits, text, tiny

Fact = namedtuple("Fact", "prompt answer")


def by_domain(num_sequences: int = 12) -> dict[str, Any]:
    packed = text(num_sequences)
    return {name: packed.take(packed.domain == i) for i, name in enumerate(packed.domains)}


def plain_score(model: Any, ids: torch.Tensor) -> tuple[float, float, int]:
    outputs = logits(model, ids)[:, :-1].double().flatten(0, 1)
    labels = ids[:, 1:].flatten()
    hits = (outputs.argmax(-1) == labels).double().mean()
    return float(F.cross_entropy(outputs, labels)), float(hits), labels.numel()


@pytest.mark.parametrize("kind", ["qwen2-tied", "gpt2", "deepseek_v3"])
def test_scores_are_token_means(kind: str) -> None:
    model, texts = tiny(kind), by_domain()
    scores = evaluate(model, texts, batch_size=3)
    for name, packed in texts.items():
        nll, accuracy, tokens = plain_score(model, packed.ids)
        assert scores[name].nll == pytest.approx(nll, rel=1e-5)
        assert scores[name].accuracy == pytest.approx(accuracy)
        assert scores[name].tokens == tokens
        assert scores[name].perplexity == pytest.approx(math.exp(scores[name].nll))
    assert set(scores) == {*texts, "all"}


def test_all_is_weighted_by_tokens() -> None:
    model, texts = tiny("qwen2"), by_domain()
    texts["domain-1"] = texts["domain-1"].take(torch.arange(1))
    scores = evaluate(model, texts, batch_size=8)
    parts = [scores[name] for name in texts]
    total = sum(part.tokens for part in parts)
    assert scores["all"].tokens == total
    weighted = sum(part.nll * part.tokens for part in parts) / total
    assert scores["all"].nll == pytest.approx(weighted)
    assert scores["all"].nll != pytest.approx(sum(part.nll for part in parts) / 3)


def test_batch_size_and_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = tiny("qwen2"), by_domain()
    whole = evaluate(model, texts, batch_size=4)["all"]
    monkeypatch.setattr("deepfusion.server.evaluate.ROWS_AT_ONCE", 7)
    small = evaluate(model, texts, batch_size=1)["all"]
    assert small.nll == pytest.approx(whole.nll, rel=1e-6)
    assert small.accuracy == whole.accuracy


def test_evaluation_leaves_the_model_as_it_was() -> None:
    model = tiny("qwen2").train()
    evaluate(model, by_domain(), batch_size=4)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_empty_domain_is_refused() -> None:
    texts = by_domain()
    texts["domain-0"] = texts["domain-0"].take(torch.arange(0))
    with pytest.raises(ValueError, match="domain 'domain-0' must hold"):
        evaluate(tiny("qwen2"), texts, batch_size=4)


def test_diverged_model_is_infinitely_perplexed() -> None:
    model = tiny("qwen2")
    build.head_weight(model).data.mul_(1e5)
    score = evaluate(model, by_domain(), batch_size=4)["all"]
    assert score.perplexity == math.inf
    assert isinstance(score, DomainScore)


class Letters:
    """One token for each character; the pair "xy" is one token."""

    def __call__(self, text: str, **_: bool) -> dict[str, Any]:
        ids, offsets, place = [], [], 0
        while place < len(text):
            size = 2 if text[place : place + 2] == "xy" else 1
            ids.append(VOCAB - 1 if size == 2 else ord(text[place]) % (VOCAB - 1))
            offsets.append((place, place + size))
            place += size
        return {"input_ids": ids, "offset_mapping": offsets}


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_recall_is_greedy_decoding(kind: str) -> None:
    model, tokenizer = tiny(kind), Letters()
    letter_of = {ord(letter) % (VOCAB - 1): letter for letter in map(chr, range(60, 120))}
    letter_of[VOCAB - 1] = "xy"
    facts, truth = [], []
    for prompt in ("What is", "dose:", "of a", "A much longer prompt than the others"):
        ids = tokenizer(prompt)["input_ids"]
        answer = "".join(letter_of[token] for token in greedy(model, ids, 3))
        facts += [Fact(prompt, answer), Fact(prompt, answer[:-1] + chr(ord(answer[-1]) ^ 1))]
        truth += [True, False]
    assert fact_recall(model, tokenizer, facts) == truth
    assert fact_recall(model, tokenizer, facts, batch_size=1) == truth


def test_token_across_the_boundary_belongs_to_the_answer() -> None:
    from deepfusion.server.evaluate import _fact_ids

    ids, first = _fact_ids(Letters(), Fact("abx", "yc"))
    assert (len(ids), first) == (4, 2)
    with pytest.raises(ValueError, match="a prompt and an answer"):
        _fact_ids(Letters(), Fact("ab", ""))


def test_a_fact_longer_than_the_models_positions_loses_its_beginning() -> None:
    """gpt2 has an embedding for each position, and none beyond."""
    most = 9
    model, tokenizer = tiny("gpt2", n_positions=most), Letters()
    letters = {ord(letter) % (VOCAB - 1): letter for letter in map(chr, range(60, 120))}
    seen = "is said of"[-(most - 1) :]
    (token,) = greedy(model, tokenizer(seen)["input_ids"], 1)
    right = letters[token]
    facts = [Fact(f"{start}{seen}", right) for start in ("", "very much ", "more than fits, ")]
    wrong = Fact(f"very much {seen}", chr(ord(right) ^ 1))
    assert fact_recall(model, tokenizer, [*facts, wrong]) == [True, True, True, False]
    with pytest.raises(ValueError, match=r"fewer tokens than the model has positions = 9, got 9"):
        fact_recall(model, tokenizer, [Fact("who?", "123456789")])


def mixture(kind: str = "qwen2", **options: Any) -> Any:
    target = "deepseek_v3" if kind == "deepseek_v3" else "qwen2_moe"
    config = MergeConfig(target=target, router_init="normal", **options)
    base = tiny(kind)
    moe = merge([build.state_of(base)] * 3, base.config, config, 1)
    for router in experts.routers(moe):
        router.get_parameter("weight").data.mul_(30)
    return moe


@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
def test_load_and_entropy_of_experts(kind: str) -> None:
    moe, texts = mixture(kind), by_domain()
    facts = expert_load(moe, texts, batch_size=3)
    with RouterTap(moe) as tap:
        logits(moe, texts["domain-1"].ids)
    for layer in range(2):
        counts = torch.bincount(tap.experts[layer].flatten(), minlength=3).double()
        torch.testing.assert_close(facts["domain-1"].load[layer], counts / counts.sum())
        P = experts.router_probabilities(moe, tap.logits[layer]).double()
        entropy = -(P * P.log()).sum(1).mean()
        torch.testing.assert_close(facts["domain-1"].entropy[layer], entropy)
    assert not torch.equal(facts["domain-0"].load, facts["domain-2"].load)


def test_uniform_router_has_the_entropy_of_its_experts() -> None:
    moe = mixture()
    for router in experts.routers(moe):
        router.get_parameter("weight").data.zero_()
    facts = expert_load(moe, by_domain(), batch_size=3)["domain-0"]
    assert facts.entropy.tolist() == pytest.approx([math.log(3)] * 2)


def test_dense_model_has_no_routing() -> None:
    with pytest.raises(ValueError, match="at least one router"):
        expert_load(tiny("qwen2"), by_domain(), batch_size=3)


@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
def test_balance_loss_of_uniform_routing_is_experts_per_token(kind: str) -> None:
    moe = mixture(kind, top_k=2)
    with RouterTap(moe) as tap:
        logits(moe, text().ids)
        skewed = balance_loss(moe, tap)
        tap.logits = [torch.zeros_like(one) for one in tap.logits]
        assert balance_loss(moe, tap) == pytest.approx(2.0)
        # every token to one expert, and sure of it
        tap.experts = [torch.zeros_like(one[:, :1]) for one in tap.experts]
        tap.logits = [F.one_hot(one[:, 0], 3) * 99.0 for one in tap.experts]
        if kind == "qwen2":
            assert balance_loss(moe, tap) == pytest.approx(3.0)
    assert skewed > 1.0


def test_router_supervision_reads_segments_and_skips_unknown_domains() -> None:
    moe = mixture(segments=2)
    with RouterTap(moe) as tap:
        logits(moe, text(2).ids)
        domain = torch.full((2 * LENGTH,), -1)
        assert supervision_loss(moe, tap, domain, 2) == 0
        domain[3], domain[5] = 2, 0
        P = [experts.router_probabilities(moe, one) for one in tap.logits]
        truth = [-(p[3, 4] + p[3, 5]).log() / 2 - (p[5, 0] + p[5, 1]).log() / 2 for p in P]
        torch.testing.assert_close(supervision_loss(moe, tap, domain, 2), torch.stack(truth).mean())


def test_tap_is_gone_after_use() -> None:
    moe = mixture()
    with RouterTap(moe) as tap:
        logits(moe, text(2).ids)
    assert len(tap.logits) == 2
    logits(moe, text(2).ids)
    assert len(tap.logits) == 2
