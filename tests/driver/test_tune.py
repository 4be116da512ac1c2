"""Tuning the mixture: frozen means frozen, and every term does what it says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepfusion.config_tables import MergeConfig, TuneConfig
from deepfusion.metrics import Recorder
from deepfusion.models import build, experts
from deepfusion.server.merge import merge
from deepfusion.server.router import RouterTap
from deepfusion.server.tune import freeze, lessons_of, tune
from deepfusion.step_checkpoint import StepCheckpoint
from deepfusion.training import make_optimizer, matrices_of

from .tiny import LENGTH, Killed, assert_same, copy_of, killing, logits, text, tiny

MERGE = MergeConfig(router_init="normal")
SHORT = TuneConfig(steps=5, batch_size=4, lr=3e-3, teacher_weight=0.0)
SEED = 5


def mixture(kind: str = "qwen2", config: MergeConfig = MERGE) -> Any:
    models = [tiny(kind, seed) for seed in range(3)]
    target = "deepseek_v3" if kind == "deepseek_v3" else "qwen2_moe"
    states = [build.state_of(model) for model in models]
    return merge(states, models[0].config, replace(config, target=target), 1)


def tuned(config: TuneConfig, moe: Any = None, merging: MergeConfig = MERGE, **options: Any) -> Any:
    options = {"recorder": Recorder(None), **options}
    return tune(mixture() if moe is None else moe, text(), config, merging, SEED, **options)


def proxies() -> dict[str, Any]:
    """Three teachers of three kinds and the affinities of text() to them."""
    affinity = torch.nn.functional.one_hot(text().domain, 3) * 0.6 - 0.1
    affinity[:3] = 0.2
    return {
        "teachers": [tiny("gpt2", 7), tiny("llama", 8), tiny("qwen2", 9)],
        "affinity_SK": affinity,
    }


def expert_tensors(moe: Any) -> dict[str, torch.Tensor]:
    blocks = experts.moe_blocks(moe)
    return {
        f"{b.name}.{n}": getattr(b, n).detach().clone() for b in blocks for n in ("gate_up", "down")
    }


@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("segments,shared", [(1, "none"), (2, "mean")])
def test_frozen_experts_are_bit_equal_and_the_rest_learns(
    kind: str, optimizer: str, segments: int, shared: str
) -> None:
    merging = replace(MERGE, segments=segments, shared=shared)
    moe = mixture(kind, merging)
    before, everything = expert_tensors(moe), copy_of(moe)
    tuned(replace(SHORT, optimizer=optimizer, weight_decay=0.1), moe, merging)
    assert_same(expert_tensors(moe), before)
    moved = {
        name
        for name, tensor in moe.state_dict().items()
        if not torch.equal(tensor, everything[name])
    }
    learning = {
        name
        for name, parameter in moe.named_parameters()
        if ".experts." not in name and (shared == "mean" or ".shared_expert" not in name)
    }
    assert moved == learning


def test_experts_that_may_learn_do() -> None:
    moe = mixture()
    before = expert_tensors(moe)
    tuned(replace(SHORT, train="all"), moe)
    after = expert_tensors(moe)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(not p.any() for block in experts.moe_blocks(moe) for p in block.shared.parameters())


def test_the_optimizer_does_not_hold_frozen_experts() -> None:
    moe = mixture()
    freeze(moe, "shared", MERGE)
    held = {
        id(parameter)
        for one in make_optimizer("muon", *matrices_of(moe), 1e-3)
        for group in one.param_groups
        for parameter in group["params"]
    }
    blocks = experts.moe_blocks(moe)
    assert not held & {id(p) for block in blocks for p in (block.gate_up, block.down)}
    assert {id(block.router.get_parameter("weight")) for block in blocks} <= held
    with pytest.raises(ValueError, match="'shared' or 'all', got 'some'"):
        freeze(moe, "some", MERGE)


def test_tuning_lowers_the_loss_and_leaves_no_patch() -> None:
    moe, recorder = mixture(), Recorder(None)
    implementation = moe.get_experts_implementation()
    tuned(replace(SHORT, steps=30, lr=1e-2), moe, recorder=recorder)
    losses = [line["loss"] for line in recorder.lines("tune")]
    assert losses[-1] < losses[0] - 0.5
    assert moe.get_experts_implementation() == implementation
    assert not any(
        "forward" in vars(router) or router._forward_hooks for router in experts.routers(moe)
    )


def test_reference_kernels_give_the_same_losses() -> None:
    config = replace(SHORT, teacher_weight=1.0, router_supervision=0.1, balance_loss_weight=0.01)
    ours, theirs = Recorder(None), Recorder(None)
    tuned(config, recorder=ours, **proxies())
    tuned(config, recorder=theirs, kernels="reference", **proxies())
    for one, other in zip(ours.lines("tune"), theirs.lines("tune"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["router"] == pytest.approx(other["router"], rel=1e-4)


def test_teacher_pulls_only_where_affinity_exceeds_the_threshold() -> None:
    known = proxies()
    from deepfusion.server.teaching import Teaching

    teaching = Teaching(mixture(), known["teachers"], beta=1.0)
    asked = replace(SHORT, teacher_threshold=0.3)
    lessons = lessons_of(text(), known["affinity_SK"], teaching, asked)
    assert lessons.teacher.tolist() == [-1, -1, -1, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    nobody = replace(SHORT, teacher_weight=1.0, teacher_threshold=0.9)
    assert_same(copy_of(tuned(nobody, **known)), copy_of(tuned(SHORT)))
    taught = tuned(replace(SHORT, teacher_weight=1.0), **known)
    assert not torch.equal(build.head_weight(taught), build.head_weight(tuned(SHORT)))


def test_paper_needs_no_teacher_and_others_say_so() -> None:
    with pytest.raises(ValueError, match="needs the proxies as teachers"):
        tuned(replace(SHORT, teacher_weight=1.0))
    with pytest.raises(ValueError, match=r"affinity must be \[S, K\] with S = 12"):
        tuned(replace(SHORT, teacher_weight=1.0), teachers=[tiny("gpt2")])


def test_text_is_even_over_domains() -> None:
    from deepfusion.server.teaching import Teaching

    packed = text().take(torch.tensor([0, 3, 6, 9, 1, 2]))
    even = lessons_of(packed, None, Teaching(mixture()), SHORT)
    assert even.weights is not None
    assert even.weights.tolist() == pytest.approx([1 / 12] * 4 + [1 / 3] * 2)
    plain = lessons_of(packed, None, Teaching(mixture()), replace(SHORT, balance_text=False))
    assert plain.weights is None


def hit_rate(moe: Any) -> float:
    packed = text()
    domain = packed.domain.repeat_interleave(LENGTH)
    with RouterTap(moe) as tap:
        logits(moe, packed.ids)
    best = [logit.argmax(dim=1) for logit in tap.logits]
    return min(float((one == domain).float().mean()) for one in best)


def test_supervised_routers_learn_the_domains() -> None:
    moe = mixture()
    affinity = torch.nn.functional.one_hot(text().domain, 3).float()
    assert hit_rate(moe) < 0.7
    config = replace(SHORT, steps=40, lr=1e-2, router_supervision=1.0)
    assert hit_rate(tuned(config, moe, affinity_SK=affinity)) > 0.9


def test_balance_loss_evens_the_load() -> None:
    def unevenness(weight: float) -> float:
        moe = mixture()
        for router in experts.routers(moe):
            router.get_parameter("weight").data.mul_(40)
        # AdamW: Muon's bfloat16 rounds make the toy's load a matter of last bits
        config = replace(SHORT, steps=30, lr=1e-2, optimizer="adamw", balance_loss_weight=weight)
        tuned(config, moe)
        with RouterTap(moe) as tap:
            logits(moe, text().ids)
        return max(
            float(torch.bincount(e.flatten(), minlength=3).double().std()) for e in tap.experts
        )

    assert unevenness(5.0) < 0.5 * unevenness(0.0)


def test_one_expert_per_token_needs_a_router_loss() -> None:
    merging = replace(MERGE, top_k=1)
    with pytest.raises(ValueError, match="gives the router no gradient"):
        tuned(SHORT, mixture(config=merging), merging)
    with pytest.warns(UserWarning, match="only the router losses train the router"):
        tuned(replace(SHORT, balance_loss_weight=0.01), mixture(config=merging), merging)


@pytest.mark.parametrize("killed_at", [1, 3])
def test_killed_tuning_ends_in_the_same_bits(killed_at: int, tmp_path: Path) -> None:
    config = replace(SHORT, teacher_weight=1.0, router_supervision=0.1)
    whole = tuned(config, **proxies())
    checkpoint = StepCheckpoint(tmp_path / "tune.safetensors", every=2)
    recorder = Recorder(None)
    with killing(recorder, "tune", killed_at), pytest.raises(Killed):
        tuned(config, checkpoint=checkpoint, recorder=recorder, **proxies())
    resumed = tuned(config, checkpoint=checkpoint, recorder=recorder, **proxies())
    assert_same(copy_of(resumed), copy_of(whole))
