"""The direct recipe and the controls: same text, same teachers, one part changed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepfusion.config import Config
from deepfusion.config_tables import (
    DistillConfig,
    MergeConfig,
    RunConfig,
    TrainingConfig,
    TuneConfig,
)
from deepfusion.metrics import Recorder
from deepfusion.models import build, experts
from deepfusion.server.controls import centralised_control, dense_control, server_steps
from deepfusion.server.direct import direct
from deepfusion.server.merge import merge
from deepfusion.server.router_init import RouterText
from deepfusion.step_checkpoint import StepCheckpoint

from .tiny import Killed, assert_same, copy_of, killing, logits, text, tiny

SEED = 5
MERGE = MergeConfig(router_init="centroids")
TUNE = TuneConfig(steps=5, batch_size=6, lr=3e-3, train="all", router_supervision=0.1)
DISTILL = DistillConfig(
    alpha=0.1, num_stages=2, patch_size=4, vaa_dim=16, vaa_heads=2, vaa_warmup_steps=2
)


def affinities() -> Any:
    """Domains 0 and 1 have a proxy; domain 2 is general text that nobody claims."""
    return torch.tensor([[0.8, 0.1], [0.0, 0.9], [0.1, 0.1]])[text().domain]


def teachers() -> list[Any]:
    return [tiny("gpt2", 7), tiny("llama", 8)]


def upcycled() -> Any:
    base = tiny("qwen2")
    reading = RouterText(text().ids, affinities())
    return merge([build.state_of(base)] * 2, base.config, MERGE, SEED, reading)


def directed(tuning: TuneConfig = TUNE, distilling: DistillConfig = DISTILL, **options: Any) -> Any:
    options = {"recorder": Recorder(None), **options}
    return direct(
        upcycled(), teachers(), text(), affinities(), distilling, tuning, MERGE, SEED, **options
    )


def test_upcycled_mixture_starts_as_the_base() -> None:
    truth = logits(tiny("qwen2"), text().ids)
    assert (logits(upcycled(), text().ids) - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_teacher_terms_fall_and_experts_part() -> None:
    recorder = Recorder(None)
    distilling = replace(DISTILL, alpha=1.0, beta=20.0)
    tuning = replace(TUNE, steps=41, lr=1e-2, router_supervision=10.0)
    moe = directed(tuning, distilling, recorder=recorder)
    lines = [line for line in recorder.lines("direct") if "kl" in line]
    for term in ("kl", "feature", "router"):
        assert lines[-1][term] < lines[0][term], term
    block = experts.moe_blocks(moe)[0]
    assert not torch.equal(block.gate_up[0], block.gate_up[1])


def test_features_off_is_kl_alone() -> None:
    recorder = Recorder(None)
    directed(distilling=replace(DISTILL, alpha=0.0), recorder=recorder)
    lines = recorder.lines("direct")
    assert not recorder.lines("direct.views")
    assert all("feature" not in line for line in lines)
    assert "kl" in lines[0]


def test_affinity_must_fit_text_and_proxies() -> None:
    with pytest.raises(ValueError, match=r"\[S, K\] = \[12, 2\], got \[12, 3\]"):
        direct(
            upcycled(), teachers(), text(), torch.zeros(12, 3), DISTILL, TUNE, MERGE, SEED,
            recorder=Recorder(None),
        )  # fmt: skip


@pytest.mark.parametrize("killed_at", [1, 3])
def test_killed_run_ends_in_the_same_bits(killed_at: int, tmp_path: Path) -> None:
    whole = directed()
    checkpoint, recorder = StepCheckpoint(tmp_path / "direct.safetensors", every=2), Recorder(None)
    with killing(recorder, "direct", killed_at), pytest.raises(Killed):
        directed(checkpoint=checkpoint, recorder=recorder)
    assert_same(copy_of(directed(checkpoint=checkpoint, recorder=recorder)), copy_of(whole))


def test_dense_control_sees_the_mixtures_text_and_teachers() -> None:
    ours, dense = Recorder(None), Recorder(None)
    plain = replace(TUNE, router_supervision=0.0, train="all")
    directed(plain, replace(DISTILL, alpha=0.0), recorder=ours)
    before = copy_of(tiny("qwen2"))
    model = dense_control(
        tiny("qwen2"), teachers(), text(), affinities(), DISTILL, plain, plain, SEED, recorder=dense
    )
    first, control = ours.lines("direct")[0], dense.lines("control.dense")[0]
    # the upcycled mixture is the base: its first loss is the dense one's
    assert control["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert control["kl"] == pytest.approx(first["kl"], rel=1e-4)
    assert not torch.equal(build.head_weight(model), before["lm_head.weight"])
    assert len(dense.lines("control.dense")) == TUNE.steps


def test_centralised_control_trains_everything_without_teachers() -> None:
    recorder = Recorder(None)
    moe = upcycled()
    before = copy_of(moe)
    centralised_control(
        moe, text(18, seed=3), replace(TUNE, lr=1e-2), MERGE, SEED, steps=12, recorder=recorder
    )
    lines = recorder.lines("control.centralised")
    assert len(lines) == 12
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "kl" not in lines[0]
    moved = {name for name, one in moe.state_dict().items() if not torch.equal(one, before[name])}
    idle = {name for name in before if ".shared_expert" in name}
    assert moved == before.keys() - idle


def test_controls_spend_what_the_recipe_spends() -> None:
    config = Config(distill=DistillConfig(steps=30), tune=TuneConfig(steps=50))
    assert server_steps(config, 4) == 170
    assert server_steps(replace(config, run=RunConfig(recipe="direct")), 4) == 50
    assert TrainingConfig in type(config.tune).__mro__
