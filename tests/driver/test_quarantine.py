"""Quarantine: bad uploads are seen on public text, an honest minority specialist is kept."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from deepfusion.config import ConfigError, resolve
from deepfusion.report_trust import quarantine_table
from deepfusion.server.quarantine import (
    ProbeScore,
    agreement,
    judge,
    keep_from_teaching,
    probe,
    probe_text,
)
from deepfusion.trust import lines

from .tiny import VOCAB, logits, text, tiny

DOMAINS = ("domain-0", "domain-1", "domain-2")
SPAN = VOCAB // 3
BOUND = 0.5


def specialist(domain: int, steps: int = 30) -> nn.Module:
    """A model that learnt which third of the vocabulary a domain uses, and that alone."""
    model = tiny("qwen2", seed=domain)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    ids = torch.randint(SPAN, (16, 12), generator=torch.Generator().manual_seed(9)) + domain * SPAN
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def scaled(model: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def loaders(**models: nn.Module) -> list[tuple[str, Callable[[], nn.Module]]]:
    return [(name, lambda model=model: model) for name, model in models.items()]


def scores(**nll: tuple[float, ...]) -> dict[str, dict[str, ProbeScore]]:
    return {
        name: {
            domain: ProbeScore(value, 1.0, 0.5) for domain, value in zip(DOMAINS, own, strict=True)
        }
        for name, own in nll.items()
    }


def test_scores_are_those_of_plain_torch() -> None:
    model, packed = tiny("gpt2"), text(9)
    own = probe(loaders(a=model, b=tiny("qwen2")), probe_text(packed, 2), batch_size=2)["a"]
    assert list(own) == list(DOMAINS)
    for index, domain in enumerate(DOMAINS):
        ids = packed.ids[packed.domain == index][:2]
        logp = logits(model, ids)[:, :-1].double().log_softmax(-1)
        nll = -logp.gather(-1, ids[:, 1:, None]).mean()
        entropy = -(logp.exp() * logp).sum(-1).mean()
        assert own[domain].nll == pytest.approx(float(nll), rel=1e-4)
        assert own[domain].entropy == pytest.approx(float(entropy), rel=1e-4)
        assert own[domain].perplexity == pytest.approx(math.exp(float(nll)), rel=1e-3)


def test_agreement_is_the_share_of_the_others() -> None:
    top = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 8], [1, 5, 9, 7]])
    assert agreement(top).tolist() == pytest.approx([3 / 8, 4 / 8, 3 / 8])
    assert agreement(top[:1]).tolist() == [0.0]


def test_honest_minority_specialist_is_kept_and_a_scaled_upload_is_not() -> None:
    """Six devices know domain 0, one alone knows domain 2, one is scaled by 10."""
    crowd = {f"crowd-{n}": specialist(0, 25 + n) for n in range(5)}
    found = probe(
        loaders(**crowd, minority=specialist(2), scaled=scaled(specialist(0), 10.0)),
        probe_text(text(24), 8),
        batch_size=8,
    )
    verdict = judge(found, BOUND)
    assert verdict.judged
    assert "scaled" in verdict.out
    assert set(verdict.past["scaled"]) == set(DOMAINS)
    assert "minority" not in verdict.out
    # the control: by the mean over domains the specialist is as far out as anybody honest
    assert "domain-0" in verdict.past["minority"]
    assert found["minority"]["domain-2"].nll < verdict.medians["domain-2"] - BOUND
    assert verdict.out == ("scaled",)


def test_past_in_every_domain_is_out_in_some_is_not() -> None:
    crowd = {f"d{n}": (1.0, 1.0, 1.0) for n in range(4)}
    verdict = judge(scores(**crowd, some=(9.0, 9.0, 1.4), every=(1.6, 9.0, math.inf)), BOUND)
    assert verdict.out == ("every",)
    assert verdict.past == {"some": DOMAINS[:2], "every": DOMAINS}
    assert verdict.medians == dict.fromkeys(DOMAINS, 1.0)
    assert judge(scores(**crowd), BOUND).past == {}


def test_two_uploads_cannot_be_judged() -> None:
    verdict = judge(scores(a=(1.0, 1.0, 1.0), b=(9.0, 9.0, 9.0)), BOUND)
    assert (verdict.judged, verdict.past, verdict.out) == (False, {}, ())


def test_nan_weights_are_infinitely_bad() -> None:
    broken = scaled(tiny("qwen2"), float("nan"))
    found = probe(loaders(a=broken, b=tiny("qwen2")), probe_text(text(6), 1), batch_size=1)
    assert found["a"]["domain-0"].nll == math.inf == found["a"]["domain-0"].perplexity


def test_cluster_past_in_a_domain_does_not_teach_it() -> None:
    packed = text(6)
    nearness = torch.full((6, 2), 0.4)
    past = {"a": ("domain-1",), "b": ("domain-1", "domain-2"), "c": ("domain-0",)}
    found = keep_from_teaching(nearness, packed, [("a", "b"), ("c", "d")], past)
    wanted = torch.full((6, 2), 0.4)
    wanted[packed.domain == 1, 0] = -1.0
    assert torch.equal(found, wanted)
    assert torch.equal(keep_from_teaching(nearness, packed, [("a",), ("c",)], {}), nearness)


def test_table_and_lines_tell_every_upload() -> None:
    own = {"nll": 1.0, "entropy": 0.5, "agreement": 0.25, "perplexity": math.e}
    facts = {
        "action": "exclude",
        "bound": BOUND,
        "judged": True,
        "medians": {"x": 1.0},
        "past": {"b": ["x"], "c": ["x"]},
        "out": ["b"],
        "scores": {name: {"x": own} for name in "abc"},
    }
    sentence, table = quarantine_table(facts)
    assert [row[-1] for row in table[1:]] == [
        "within the bound",
        "past everywhere: left out",
        "past in x",
    ]
    assert "left out if that is so in every domain" in sentence
    assert "too few uploads" in quarantine_table({**facts, "judged": False})[0]
    assert "used all the same" in quarantine_table({**facts, "action": "report"})[0]
    assert lines(facts)[1] == "  b: x 1.00 nats, entropy 0.50, agrees 25%: out"


def test_specialists_without_public_text_of_their_own_are_protected() -> None:
    given = {"data": {"public": "general"}, "quarantine": {"action": "exclude"}}
    with pytest.raises(ConfigError, match=r"quarantine\.action must be 'report' or 'none'"):
        resolve(given)
    resolve({"data": {"public": "general"}})
