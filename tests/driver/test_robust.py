"""Averages of a cluster: exact on toy states, and one bad member does not own them."""

import pytest
import torch
from torch import Tensor

from deepfusion.config import ConfigError, resolve
from deepfusion.config_tables import ClusterConfig
from deepfusion.report_trust import robust_sentence
from deepfusion.server import robust
from deepfusion.server.cluster import cluster, clustering_facts
from deepfusion.server.proxy import mean_state
from deepfusion.server.robust import RULES, robust_state

from .test_cluster import SEED, Upload, state_of, toy_devices

BASE = {
    "embed": torch.zeros(5, 3),
    "head": torch.zeros(5, 3),
    "norm": torch.zeros(3),
    "steps": torch.tensor(3),
}


def members(count: int) -> list[Upload]:
    return toy_devices()[:count]


def with_a_liar(factor: float) -> tuple[list[Upload], dict[str, dict[str, Tensor]]]:
    """Five honest members near one model, the last scaled by `factor`."""
    draw = torch.Generator().manual_seed(3)
    middle = torch.randn(40, generator=draw)
    uploads = members(5)
    states = {u.device: {"w": middle + 0.1 * torch.randn(40, generator=draw)} for u in uploads}
    states[uploads[-1].device] = {"w": factor * states[uploads[-1].device]["w"]}
    return uploads, states


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [1, 2])
def test_no_rule_changes_one_or_two_members(rule: str, count: int) -> None:
    found = robust_state(members(count), state_of, rule, base=BASE)
    plain = mean_state(members(count), state_of)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("count", [3, 4, 7])
def test_median_is_torchs(count: int) -> None:
    states = [state_of(u) for u in members(count)]
    found = robust_state(members(count), state_of, "median")
    for name in ("embed", "norm"):
        truth = torch.stack([s[name] for s in states]).double().quantile(0.5, dim=0)
        torch.testing.assert_close(found[name].double(), truth, rtol=0, atol=1e-6)
    assert found["embed"] is found["head"], "tied weights stay one tensor"
    assert found["steps"].dtype == torch.int64


@pytest.mark.parametrize("count, dropped", [(3, 1), (4, 1), (9, 1), (10, 2)])
def test_trimmed_leaves_out_the_ends(count: int, dropped: int) -> None:
    uploads = members(count)
    found = robust_state(uploads, state_of, "trimmed")["norm"].double()
    columns = torch.stack([state_of(u)["norm"] for u in uploads]).double().sort(dim=0).values
    torch.testing.assert_close(found, columns[dropped : count - dropped].mean(0), rtol=0, atol=1e-6)


def test_clip_draws_long_updates_back_to_the_median_length() -> None:
    uploads, states = with_a_liar(10.0)
    base = {"w": torch.ones(40)}
    found = robust_state(uploads, lambda u: states[u.device], "clip", base=base)["w"].double()
    moves = torch.stack([states[u.device]["w"].double() - 1 for u in uploads])
    lengths = moves.norm(dim=1)
    share = (lengths.median() / lengths).clamp(max=1)
    torch.testing.assert_close(found, 1 + (share[:, None] * moves).mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["clip", "median", "trimmed"])
def test_a_scaled_member_does_not_own_the_average(rule: str) -> None:
    uploads, states = with_a_liar(10.0)
    honest = torch.stack([states[u.device]["w"] for u in uploads[:-1]]).mean(0)
    base = {"w": torch.zeros(40)}

    def distance(kind: str) -> float:
        found = robust_state(uploads, lambda u: states[u.device], kind, base=base)["w"]
        return float((found - honest).norm() / honest.norm())

    # the control: the plain mean is 1.8 times the honest one
    assert distance("none") > 1.5
    assert distance(rule) < 0.1


@pytest.mark.parametrize("rule", RULES)
def test_equal_models_give_the_model_bit_for_bit(rule: str) -> None:
    weight = torch.randn(64, 5)
    base = {"w": torch.zeros(64, 5)}
    found = robust_state(members(7), lambda _: {"w": weight}, rule, base=base)
    assert torch.equal(found["w"], weight)


def test_pieces_give_the_same_as_everything_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = robust_state(members(5), state_of, "median")
    monkeypatch.setattr(robust, "COLUMN_BYTES", 100)
    asked = []

    def counting(upload: Upload) -> dict[str, Tensor]:
        asked.append(upload.device)
        return state_of(upload)

    pieces = robust_state(members(5), counting, "median")
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert len(asked) > 5 + 1, "with a small budget uploads are read more than once"


def test_unlike_members_and_rules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cluster\.robust must be one of none, clip"):
        robust_state(members(3), state_of, "mode")
    with pytest.raises(ValueError, match="'clip' needs the architecture's common start"):
        robust_state(members(3), state_of, "clip")
    states = iter([{"n": torch.ones(1)}] * 2 + [{"n": torch.ones(2)}] * 2)
    with pytest.raises(ValueError, match=r"tensor 'n' must be \[1\], got \[2\]"):
        robust_state(members(3), lambda _: next(states), "median")
    with pytest.raises(ConfigError, match=r"cluster\.weights must be 'uniform'"):
        resolve({"cluster": {"robust": "median", "weights": "tokens"}})


def test_clusters_say_which_average_they_got() -> None:
    uploads = toy_devices(3, 4)
    config = ClusterConfig(num_clusters=3, robust="median")
    found = cluster(uploads, state_of, config, SEED)
    facts = clustering_facts(found, uploads, robust="median")
    sizes = [len(one["members"]) for one in facts["clusters"]]
    rules = [one["robust"] for one in facts["clusters"]]
    assert rules == ["median" if size >= 3 else "none" for size in sizes]
    assert "median" in rules
    facts["clusters"][0]["robust"] = "none"
    assert "Clusters 0 have one or two members" in robust_sentence(facts, "median")
    assert robust_sentence(facts, "none") == ""
