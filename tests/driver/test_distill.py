"""Distillation: what the loss is, who is moved by it, and that a kill changes nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deepfusion.config_tables import DistillConfig
from deepfusion.data.batches import rows
from deepfusion.metrics import Recorder
from deepfusion.models import build
from deepfusion.seeding import seed_for
from deepfusion.server.distill import distill
from deepfusion.server.teaching import Teaching, backend_of
from deepfusion.server.views import LinearViews, make_views, pooled
from deepfusion.step_checkpoint import StepCheckpoint
from deepfusion.training import cross_entropy, make_optimizer, matrices_of, train_steps

from .tiny import LENGTH, Killed, assert_same, copy_of, killing, logits, text, tiny

SHORT = DistillConfig(
    steps=6,
    batch_size=4,
    lr=3e-3,
    alpha=0.1,
    num_stages=2,
    patch_size=4,
    vaa_dim=16,
    vaa_heads=2,
    vaa_warmup_steps=3,
    sampling="uniform",
)
PLAIN = replace(SHORT, alpha=0.0, beta=0.0)
SEED = 5


def taught(config: DistillConfig, teacher: Any = None, affinity: Any = None, **options: Any) -> Any:
    options = {"recorder": Recorder(None), "stage": "distill-0", **options}
    teacher = tiny("gpt2", 9) if teacher is None else teacher
    return distill(teacher, tiny("qwen2"), text(), affinity, config, SEED, **options)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_without_teacher_terms_it_is_plain_fine_tuning_step_for_step(optimizer: str) -> None:
    config, packed = replace(PLAIN, optimizer=optimizer), text()
    model, recorder = tiny("qwen2"), Recorder(None)
    train_steps(
        {"student": model},
        make_optimizer(optimizer, *matrices_of(model), config.lr),
        lambda start: rows(12, 4, 6, seed_for(SEED, "distill"), start=start),
        lambda chosen, step: {"loss": cross_entropy(model, packed.ids[chosen])},
        config,
        stage="plain",
        seed=SEED,
        recorder=recorder,
    )
    ours = Recorder(None)
    assert_same(copy_of(taught(config, recorder=ours)), copy_of(model))
    assert [line["loss"] for line in ours.lines()] == [line["loss"] for line in recorder.lines()]
    assert not torch.equal(build.head_weight(model), build.head_weight(tiny("qwen2")))


@pytest.mark.parametrize("features", ["vaa", "linear", "none"])
def test_teacher_is_unchanged_and_without_gradient(features: str) -> None:
    teacher = tiny("llama", 9).train()
    before = copy_of(teacher)
    student = taught(replace(SHORT, feature_loss=features), teacher)
    assert_same(copy_of(teacher), before)
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not torch.equal(build.head_weight(student), build.head_weight(tiny("qwen2")))


def plain_loss(
    student: Any, teachers: list[Any], ids: Tensor, owner: Tensor, beta: float, tau: float
) -> Tensor:
    """CE + beta tau^2 KL from logits, in double."""
    ours = logits(student, ids)[:, :-1].double()
    total = F.cross_entropy(ours.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    for b, teacher in enumerate(owner.tolist()):
        if teacher >= 0:
            theirs = logits(teachers[teacher], ids[b : b + 1])[0, :-1].double() / tau
            q = F.log_softmax(ours[b] / tau, -1)
            kl = F.kl_div(q, F.log_softmax(theirs, -1), log_target=True, reduction="sum")
            total = total + beta * tau**2 * kl
    return total / ids[:, 1:].numel()


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("owner", [[0, 0, 0, 0], [-1, 0, 1, 1], [1, -1, 0, 1]])
def test_loss_is_the_formula(tau: float, kernels: str, owner: list[int]) -> None:
    student, teachers = tiny("qwen2"), [tiny("gpt2", 3), tiny("llama", 4)]
    ids, teacher_B = text(4).ids, torch.tensor(owner)
    teaching = Teaching(student, teachers, beta=0.7, temperature=tau, kernels=kernels)
    terms = teaching.loss(ids, teacher_B, step=0)
    truth = plain_loss(student, teachers, ids, teacher_B, 0.7, tau)
    assert float(terms["loss"].detach()) == pytest.approx(float(truth), rel=1e-5)
    ce = plain_loss(student, teachers, ids, torch.full((4,), -1), 0.0, 1.0)
    assert float(terms["ce"]) == pytest.approx(float(ce), rel=1e-5)
    share = float((teacher_B >= 0).float().mean())
    assert float(terms["kl"]) == pytest.approx(float(truth - ce) / (0.7 * share), rel=1e-4)


def test_teacher_equal_to_the_student_teaches_nothing() -> None:
    student, twin, ids = tiny("qwen2"), tiny("qwen2"), text(4).ids
    cross_entropy(student, ids).backward()
    truth = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    terms = Teaching(student, [twin], beta=3.0).loss(ids, torch.zeros(4, dtype=torch.int64), 0)
    terms["loss"].backward()
    assert abs(float(terms["kl"])) <= 1e-6
    for name, parameter in student.named_parameters():
        assert (parameter.grad - truth[name]).abs().max() <= 1e-6 * max(1, truth[name].abs().max())


@pytest.mark.parametrize("features", ["vaa", "linear"])
def test_feature_loss_reaches_every_stage(features: str) -> None:
    student, teacher = tiny("llama"), tiny("gpt2", 3)
    config = replace(SHORT, feature_loss=features)
    views = make_views(student, teacher, config, SEED, "distill-0")
    teaching = Teaching(student, [teacher], [views], alpha=1.0, num_stages=2)
    for stage, last in enumerate((2, 3)):
        student.zero_grad()
        _, stages = teaching._run(student, text(4).ids)
        with torch.no_grad():
            targets = teaching._run(teacher, text(4).ids)[1]
        alone = [one if j == stage else one.detach() for j, one in enumerate(stages)]
        views(alone, targets).backward()
        reached = [
            any(p.grad is not None and p.grad.any() for p in layer.parameters())
            for layer in build.layers(student)
        ]
        assert reached == [n < last for n in range(3)], "stage j ends after layer ceil(j L / J)"
    assert all(parameter.grad is not None for parameter in views.parameters())


def test_dropping_the_views_leaves_the_student_as_it_is() -> None:
    student = taught(SHORT)
    fresh = tiny("qwen2")
    fresh.load_state_dict(student.state_dict())
    assert torch.equal(logits(student, text().ids), logits(fresh, text().ids))
    assert not any(layer._forward_hooks for layer in build.layers(student))


@pytest.mark.parametrize("features", ["vaa", "linear"])
def test_teacher_terms_fall(features: str) -> None:
    recorder = Recorder(None)
    # the teacher knows nothing of the text: with beta = 1 cross entropy would win over it
    config = replace(SHORT, steps=41, feature_loss=features, lr=1e-2, beta=20.0, alpha=1.0)
    config = replace(config, vaa_warmup_steps=15)
    taught(config, recorder=recorder)
    lines = [line for line in recorder.lines("distill-0") if "kl" in line]
    for term in ("kl", "feature"):
        assert lines[-1][term] < lines[0][term], term
    assert [line["step"] for line in lines] == [0, 10, 20, 30, 40]
    warm = [line["loss"] for line in recorder.lines("distill-0.views")]
    assert len(warm) == 15
    assert warm[-1] < warm[0]


def test_warming_the_views_up_does_not_move_the_student() -> None:
    config = replace(SHORT, steps=0)
    assert_same(copy_of(taught(config)), copy_of(tiny("qwen2")))


@pytest.mark.parametrize(
    "config", [SHORT, replace(SHORT, feature_loss="linear", optimizer="adamw")]
)
@pytest.mark.parametrize("killed_at", [1, 5])
def test_killed_distillation_ends_in_the_same_bits(
    config: DistillConfig, killed_at: int, tmp_path: Path
) -> None:
    whole_recorder, recorder = Recorder(None), Recorder(None)
    whole = taught(config, recorder=whole_recorder)
    checkpoint = StepCheckpoint(tmp_path / "distill.safetensors", every=2)

    with killing(recorder, "distill-0", killed_at), pytest.raises(Killed):
        taught(config, checkpoint=checkpoint, recorder=recorder)
    assert (tmp_path / "distill.safetensors").exists() == (killed_at > 2)
    resumed = taught(config, checkpoint=checkpoint, recorder=recorder)
    assert_same(copy_of(resumed), copy_of(whole))
    assert recorder.lines("distill-0") == whole_recorder.lines("distill-0")


def test_reference_kernels_give_the_same_losses() -> None:
    config = replace(SHORT, steps=4)
    ours, theirs = Recorder(None), Recorder(None)
    taught(config, recorder=ours)
    taught(config, recorder=theirs, kernels="reference")
    for one, other in zip(ours.lines("distill-0"), theirs.lines("distill-0"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert backend_of("auto") is None
    with pytest.raises(ValueError, match="'auto' or 'reference', got 'triton'"):
        backend_of("triton")


def test_affinity_decides_which_text_is_drawn() -> None:
    config = replace(PLAIN, sampling="affinity", steps=40, batch_size=8)
    packed = text()
    near = torch.where(packed.domain == 1, 1.0, -1.0)
    drawn: list[Tensor] = []

    student = tiny("qwen2")
    build.backbone(student).register_forward_pre_hook(
        lambda module, args, kwargs: drawn.append(kwargs.get("input_ids", *args[:1])),
        with_kwargs=True,
    )
    distill(tiny("gpt2"), student, packed, near, config, SEED, stage="d", recorder=Recorder(None))
    span = 61 // 3
    share = (torch.cat(drawn)[:, 0] // span == 1).float().mean()
    assert share == pytest.approx(2 / 3, abs=0.1)
    with pytest.raises(ValueError, match=r"affinity must be \[S\] = \[12\]"):
        taught(config)


def test_students_of_one_seed_differ_by_their_teacher_only() -> None:
    first, again = (taught(SHORT, tiny("gpt2", 9)) for _ in range(2))
    other = taught(SHORT, tiny("gpt2", 10))
    assert_same(copy_of(first), copy_of(again))
    assert not torch.equal(build.head_weight(first), build.head_weight(other))
    plain_first = taught(PLAIN, tiny("gpt2", 9), stage="distill-0")
    plain_other = taught(PLAIN, tiny("gpt2", 10), stage="distill-1")
    assert_same(copy_of(plain_first), copy_of(plain_other))


def test_linear_views_are_the_mean_squared_error_of_pooled_features() -> None:
    views = LinearViews(6, 5, 2, 4, False, torch.Generator().manual_seed(1))
    students = [torch.randn(3, LENGTH - 2, 6) for _ in range(2)]
    teachers = [torch.randn(3, LENGTH - 2, 5) for _ in range(2)]
    truth = sum(
        F.mse_loss(F.linear(pooled(s, 4), views.weight[j], views.bias[j]), pooled(t, 4))
        for j, (s, t) in enumerate(zip(students, teachers, strict=True))
    )
    torch.testing.assert_close(views(students, teachers), truth)
    assert pooled(students[0], 4).shape == (3, 3, 6)
    torch.testing.assert_close(pooled(students[0], 4)[:, 2], students[0][:, 8:].mean(1))


def test_too_many_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="num_stages"):
        taught(replace(SHORT, num_stages=3))
