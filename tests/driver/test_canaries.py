"""Planted secrets: where they lie, and how much of them a model tells."""

import math

import pytest
import torch
from torch import nn

from deepfusion.config import ConfigError, resolve
from deepfusion.data.canaries import COPIES, make_canaries, plant
from deepfusion.data.corpora import train_tokenizer
from deepfusion.data.documents import Document
from deepfusion.models import build
from deepfusion.report_privacy import exposure_table, privacy_text
from deepfusion.server.exposure import _log_likelihood, exposure
from deepfusion.training import cross_entropy

CANARIES = make_canaries(7, 2, 2, num_others=31)


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return train_tokenizer(["The access code of 0123456789 Kavek is."] * 20, 280)


def model(tokenizer: object) -> nn.Module:
    made: nn.Module = build.build(
        "llama",
        len(tokenizer),  # type: ignore[arg-type]
        torch.Generator().manual_seed(0),
        64,
        0,
    )
    return made


def test_secrets_are_drawn_by_the_seed_and_differ() -> None:
    assert make_canaries(7, 2, 2, num_others=31) == CANARIES
    assert make_canaries(8, 2, 2, num_others=31) != CANARIES
    for one in CANARIES:
        every = {one.text, *one.others}
        assert len(every) == 32
        assert len({text[:-8] for text in every}) == 1, "only the code differs"
    assert make_canaries(7, 0, 2) == []


def test_only_the_holder_gets_its_secret() -> None:
    shards = [[Document(f"text {n}", str(n), "d", "a/b")] for n in range(2)]
    planted = plant(shards, CANARIES)
    for device, documents in enumerate(planted):
        texts = [one.text for one in documents]
        assert texts[0] == f"text {device}"
        assert texts[1:] == [CANARIES[device].text] * COPIES
    assert plant(shards, []) == shards


def test_memorised_secret_is_told_and_others_are_not(tokenizer: object) -> None:
    one, other = CANARIES
    student = model(tokenizer)
    ids = tokenizer([one.text], add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    before = exposure(student, tokenizer, one.text, one.others)
    for _ in range(30):
        cross_entropy(student, torch.tensor(ids)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert exposure(student, tokenizer, one.text, one.others) == 5.0
    assert before < 5.0
    assert exposure(student, tokenizer, other.text, other.others) < 5.0


def test_exposure_is_the_rank(tokenizer: object) -> None:
    one, untrained = CANARIES[0], model(tokenizer)
    values = [
        _log_likelihood(untrained, tokenizer, [text]).item() for text in (one.text, *one.others)
    ]
    rank = sum(value >= values[0] for value in values)
    found = exposure(untrained, tokenizer, one.text, one.others, batch_size=5)
    assert found == pytest.approx(math.log2(32 / rank))
    with pytest.raises(ValueError, match="others must be different texts"):
        exposure(untrained, tokenizer, one.text, [one.text])


def test_likelihood_is_that_of_the_loss(tokenizer: object) -> None:
    """Padding beside longer texts changes nothing."""
    texts, untrained = [CANARIES[0].text, "The access code"], model(tokenizer)
    together = _log_likelihood(untrained, tokenizer, texts)
    for text, value in zip(texts, together, strict=True):
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]  # type: ignore[operator,attr-defined]
        mean = cross_entropy(untrained, torch.tensor([ids]))
        assert float(value) == pytest.approx(-float(mean.detach()) * (len(ids) - 1), rel=1e-4)


def test_report_says_what_is_known() -> None:
    told = {"epsilon": 3.25, "delta": 1e-5, "noise": 1.0, "clip": 1.0, "rate": 0.1, "steps": 9.0}
    rows = [{"device": "device-00", "privacy": told}, {"device": "device-01", "privacy": {}}]
    text = privacy_text(rows)
    assert "DP-SGD on 1 of 2 devices: epsilon at most 3.25 at delta 1e-05 (device-00" in text
    assert "On the other devices there is no differential privacy." in text
    assert "no differential privacy" not in privacy_text(rows[:1])
    assert "There is no differential privacy" in privacy_text(rows[1:])
    facts = {"planted": 2, "copies": 8, "most": 5.0, "exposure": {"base": [0.5, 5.0]}}
    sentence, table = exposure_table(facts)
    assert "at most 5.00 bits here" in sentence
    assert table[1] == ["base", "2", "2.75", "5.00", "1/2"]


def test_nothing_is_planted_in_text_of_the_devices_own() -> None:
    resolve({}, ["evaluate.canaries=2"])
    with pytest.raises(ConfigError, match=r"evaluate.canaries must be 0 with .* 'own'"):
        resolve({}, ["evaluate.canaries=2", "data.private='own'"])
