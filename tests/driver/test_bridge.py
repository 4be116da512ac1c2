"""Bridges: what L_KL and L_FM become where the proxy has another tokenizer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from deepfusion import config as configuration
from deepfusion import pipeline
from deepfusion.config import ConfigError
from deepfusion.config_tables import DistillConfig
from deepfusion.data.batches import Packed
from deepfusion.metrics import Recorder
from deepfusion.models import build
from deepfusion.server.bridge import Bridge
from deepfusion.server.distill import distill
from deepfusion.server.teaching import Teaching
from deepfusion.server.views import make_views
from deepfusion.training import cross_entropy
from tests.cross_tokenizer.made import lower_casing, tokenizer, words

from .test_pipeline import TINY, scores
from .tiny import QWEN2, assert_same, copy_of

LENGTH = 24
KINDS = ("mapped", "uld", "alm")
CONFIG = DistillConfig(
    steps=6,
    batch_size=4,
    lr=3e-3,
    alpha=0.1,
    num_stages=2,
    patch_size=4,
    patchify="pool",
    vaa_dim=16,
    vaa_heads=2,
    vaa_warmup_steps=3,
    sampling="uniform",
)


def model_for(kind: str, seed: int, length: int = LENGTH) -> Any:
    keys = {**QWEN2, "vocab_size": len(tokenizer(kind)), "max_position_embeddings": length}
    config = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    return build.from_config(config, torch.Generator().manual_seed(seed))


def public(kind: str = "byte-300", rows: int = 8) -> Packed:
    ids = [one for text in words() for one in [*tokenizer(kind)(text)["input_ids"], 0]]
    kept = torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)
    return Packed(kept, torch.arange(rows), torch.zeros(rows, dtype=torch.int64), ("made",))


def bridge_for(kind: str, device: str = "unigram", base: str = "byte-300") -> Bridge:
    config = replace(CONFIG, tokenizer_bridge=kind)
    return Bridge(tokenizer(base), tokenizer(device), config, "auto", 64)


def teaching_for(kind: str, teacher: Any, bridge: Bridge, **options: Any) -> Teaching:
    return Teaching(model_for("byte-300", 1), [teacher], beta=0.7, bridge=bridge, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_cross_entropy_plus_the_bridges_mean(kind: str) -> None:
    bridge, ids = bridge_for(kind), public().ids[:4]
    teaching = teaching_for(kind, model_for("unigram", 2), bridge)
    terms = teaching.loss(ids, torch.zeros(4, dtype=torch.int64), step=0)
    batch = bridge.batch(ids)
    assert batch.teacher_ids.shape == ids.shape, "the proxy knows no more positions"
    logits = [
        model(input_ids=one, use_cache=False).logits
        for model, one in ((teaching.student, ids), (teaching.teachers[0], batch.teacher_ids))
    ]
    mean = bridge.loss(*logits, batch)
    ce = cross_entropy(teaching.student, ids)
    assert float(mean.detach()) > 0
    torch.testing.assert_close(terms["loss"], ce + 0.7 * mean)
    torch.testing.assert_close(terms["kl"], mean.detach(), rtol=1e-3, atol=1e-6)
    terms["loss"].backward()
    assert all(p.grad is not None for p in teaching.student.parameters())


def test_only_taught_sequences_meet_the_bridge() -> None:
    bridge, ids = bridge_for("alm"), public().ids[:4]
    teaching = teaching_for("alm", model_for("unigram", 2), bridge)
    owner = torch.tensor([-1, -1, 0, 0])
    part = teaching.loss(ids[2:], torch.zeros(2, dtype=torch.int64), 1)["loss"]
    whole = teaching.loss(ids, owner, 1)["loss"]
    ce = cross_entropy(teaching.student, ids[:2])
    torch.testing.assert_close(whole, (part + ce) / 2)


@pytest.mark.parametrize("kind", ["mapped", "alm"])
def test_equal_models_of_one_tokenizer_teach_nothing(kind: str) -> None:
    bridge = bridge_for(kind, device="byte-300")
    teaching = teaching_for(kind, model_for("byte-300", 1), bridge)
    terms = teaching.loss(public().ids[:4], torch.zeros(4, dtype=torch.int64), step=0)
    assert abs(float(terms["kl"])) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_compared_by_the_same_characters(kind: str) -> None:
    bridge, teacher = bridge_for(kind), model_for("unigram", 2)
    student, ids = model_for("byte-300", 1), public().ids[:4]
    views = make_views(student, teacher, CONFIG, 5, "distill-0")
    teaching = Teaching(student, [teacher], [views], alpha=1.0, num_stages=2, bridge=bridge)
    terms = teaching.loss(ids, torch.zeros(4, dtype=torch.int64), step=1)
    batch = bridge.batch(ids)
    with torch.no_grad():
        stages = teaching._run(student, ids)[1], teaching._run(teacher, batch.teacher_ids)[1]
    assert views is not None
    torch.testing.assert_close(
        terms["feature"], views(*stages, **bridge.patches(batch)).detach(), rtol=1e-5, atol=1e-7
    )
    terms["loss"].backward()
    assert all(p.grad is not None for p in views.parameters())
    text = bridge.both.align_ids(ids[0].tolist())
    ends = dict(
        zip((e for _, e in text.student_spans), (e for _, e in text.teacher_spans), strict=True)
    )
    tables = [
        bridge.patches(batch)[f"{side}_offsets"][0].tolist() for side in ("student", "teacher")
    ]
    starts = dict(
        zip((s for s, _ in text.student_spans), (s for s, _ in text.teacher_spans), strict=True)
    )
    pairs = list(zip(*tables, strict=True))
    assert all(starts.get(a) == b or ends.get(a) == b for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_is_distilled_and_the_proxy_stays(kind: str) -> None:
    teacher, recorder = model_for("unigram", 2), Recorder(None)
    with torch.no_grad():
        # a proxy that is sure of something: an untrained one is nearly uniform, like the student
        build.head_weight(teacher).mul_(40)
    before, student = copy_of(teacher), model_for("byte-300", 1)
    config = replace(CONFIG, tokenizer_bridge=kind, steps=21, lr=1e-2, beta=20.0)
    distill(
        teacher, student, public(), None, config, 5, stage="distill-0", recorder=recorder,
        bridge=bridge_for(kind),
    )  # fmt: skip
    assert_same(copy_of(teacher), before)
    lines = [line for line in recorder.lines("distill-0") if "kl" in line]
    assert lines[-1]["kl"] < lines[0]["kl"]
    warm = [line["loss"] for line in recorder.lines("distill-0.views")]
    assert warm[-1] < warm[0]


def test_text_that_cannot_be_aligned_is_refused_before_any_step() -> None:
    config = replace(CONFIG, tokenizer_bridge="alm")
    bridge = Bridge(tokenizer("byte-300"), lower_casing(), config, "auto", 64)
    text = tokenizer("byte-300")("Upper case")["input_ids"]
    fine = tokenizer("byte-300")("lower case")["input_ids"]
    shorter = min(len(text), len(fine))
    with pytest.raises(ValueError, match=r"public sequence 1: .*teacher's tokens spell"):
        bridge.check(torch.tensor([fine[:shorter], text[:shorter]]))


def load(*lines: str) -> configuration.Config:
    return configuration.resolve({}, [*TINY, *lines], "a test")


def test_a_bridge_needs_a_tokenizer_and_a_tokenizer_a_bridge(tmp_path: Path) -> None:
    own = f"devices.tokenizer='{tmp_path}'"
    with pytest.raises(ConfigError, match=r"must be 'shared' where devices.tokenizer is empty"):
        load("distill.tokenizer_bridge='alm'")
    with pytest.raises(ConfigError, match=r"must be 'shared' where devices.tokenizer is empty"):
        load(own)
    with pytest.raises(ConfigError, match=r"tune.teacher_weight must be 0(.|\n)*controls.dense"):
        load(own, "distill.tokenizer_bridge='alm'")
    with pytest.raises(ConfigError, match=r"distill.patchify = 'pool'"):
        load(own, "distill.tokenizer_bridge='alm'", "distill.patchify='conv'")


@pytest.mark.slow
def test_run_whose_devices_have_another_tokenizer(tmp_path: Path) -> None:
    tokenizer("unigram").save_pretrained(str(tmp_path / "own"))
    config = load(
        f"run.output='{tmp_path / 'run'}'",
        f"devices.tokenizer='{tmp_path / 'own'}'",
        "distill.tokenizer_bridge='mapped'",
        "distill.patchify='pool'",
        "tune.teacher_weight=0.0",
        "controls.dense=false",
        "controls.centralised=false",
    )
    pipeline.run(config)
    found = scores(tmp_path / "run")
    assert {"base", "M 0", "moe"} <= found.keys()
    assert not any(name.startswith(("device-", "proxy ")) for name in found)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "do not compare across tokenizers" in report.replace("\n", " ")
    students = [found[name] for name in found if name.startswith("M ")]
    assert all(torch.tensor(students).isfinite())
