"""Fit: the proxy that expects a text is the one that fits it best."""

from dataclasses import replace

import pytest
import torch

from deepfusion.config_tables import TuneConfig
from deepfusion.data.batches import Packed, rows
from deepfusion.seeding import seed_for
from deepfusion.server.affinity import balanced_weights
from deepfusion.server.fit import fit
from deepfusion.server.tune import drawn

from .tiny import LENGTH, logits, text, tiny

COPYING = 40


def taught_to_repeat(token: int) -> torch.nn.Module:
    """A model that expects one token everywhere."""
    model = tiny("qwen2")
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    ids = torch.full((2, LENGTH), token)
    for _ in range(COPYING):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model


def of_ids(ids: torch.Tensor) -> Packed:
    return replace(text(len(ids)), ids=ids)


def test_who_learned_a_text_fits_it_best() -> None:
    proxies = [taught_to_repeat(token) for token in (3, 5, 9)]
    ids = torch.tensor([9, 3, 5, 5])[:, None].expand(4, LENGTH).contiguous()
    assert fit(proxies, of_ids(ids), batch_size=3).argmax(dim=1).tolist() == [2, 0, 1, 1]


@pytest.mark.parametrize("kinds", [("gpt2",), ("qwen2-tied", "gpt2", "qwen2")])
def test_it_is_the_centred_mean_probability(kinds: tuple[str, ...]) -> None:
    proxies, packed = [tiny(kind) for kind in kinds], text(5)
    with torch.no_grad():
        plain = torch.stack(
            [
                logits(one, packed.ids)[:, :-1]
                .double()
                .softmax(-1)
                .gather(-1, packed.ids[:, 1:, None])
                .mean((1, 2))
                for one in proxies
            ],
            dim=1,
        )
    expected = plain - plain.mean(1, keepdim=True)
    found = fit(proxies, packed, batch_size=2)
    assert found.shape == (5, len(kinds))
    torch.testing.assert_close(found.double(), expected, atol=1e-7, rtol=1e-4)


def test_one_surprise_does_not_hide_that_the_rest_was_expected() -> None:
    knows, vague = taught_to_repeat(3), tiny("qwen2")
    ids = torch.full((1, LENGTH), 3)
    ids[0, LENGTH // 2] = 7
    found = fit([knows, vague], of_ids(ids), batch_size=1)
    assert found[0, 0] > found[0, 1]


def test_rows_not_asked_about_are_near_to_nobody() -> None:
    proxies, packed = [tiny("gpt2"), tiny("qwen2")], text(6)
    asked = torch.tensor([1, 4])
    some, every = fit(proxies, packed, 4, asked), fit(proxies, packed, 4)
    assert torch.equal(some[[0, 2, 3, 5]], torch.zeros(4, 2))
    torch.testing.assert_close(some[asked], every[asked], atol=1e-6, rtol=1e-5)
    assert every[asked].ne(0).all()


@pytest.mark.parametrize("balance_text", [True, False])
def test_drawn_rows_are_those_of_the_stream(balance_text: bool) -> None:
    packed = text(40)
    config = TuneConfig(steps=3, batch_size=4, balance_text=balance_text)
    weights = balanced_weights(packed.domain) if balance_text else None
    batches = rows(40, 4, 3, seed_for(11, "tune"), weights=weights)
    assert drawn(packed, config, 11).tolist() == sorted({int(i) for one in batches for i in one})
    assert drawn(packed, replace(config, steps=0), 11).tolist() == []


def test_without_a_proxy() -> None:
    with pytest.raises(ValueError, match="at least one proxy"):
        fit([], text(2), batch_size=1)
