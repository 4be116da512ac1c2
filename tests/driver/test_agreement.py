"""Agreement: the gradient is that of the capped mixture, and a lone liar has half a voice."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepfusion.config import ConfigError, resolve
from deepfusion.config_tables import MergeConfig, TuneConfig
from deepfusion.metrics import Recorder
from deepfusion.models import build
from deepfusion.server.agreement import CAP, Agreement, agreed
from deepfusion.server.merge import merge
from deepfusion.server.teaching import Teaching
from deepfusion.server.tune import tune

from .tiny import copy_of, text, tiny

ROWS = torch.arange(6)


def made(beta: float = 1.0, **changes: object) -> Agreement:
    teaching = Teaching(
        student=tiny("qwen2", seed=5), teachers=[tiny("qwen2"), tiny("gpt2", seed=2)], beta=beta
    )
    fields = {
        "student": teaching.student,
        "teachers": teaching.teachers,
        "beta": beta,
        "second": torch.tensor([1, 0, -1, 1, 0, -1]),
        "weight": torch.tensor([[0.5, 0.3], [0.5, 0.5], [0.5, 0], [0.4, 0.5], [0.5, 0.2], [0, 0]]),
        **changes,
    }
    return Agreement(**fields)  # type: ignore[arg-type]


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def test_gradient_is_that_of_the_mixture_of_probabilities() -> None:
    agreement, packed = made(beta=0.7), text(6)
    first = torch.tensor([0, 1, 0, 0, 1, -1])
    ours = agreement.loss(packed.ids, first, 0, ROWS)
    student = agreement.student
    found = gradient(student, ours["loss"])

    logq = student(packed.ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    ce = F.nll_loss(logq.flatten(0, 1), packed.ids[:, 1:].flatten())
    with torch.no_grad():
        known = [one(packed.ids).logits[:, :-1].softmax(-1) for one in agreement.teachers]
        target = torch.zeros_like(logq)
        for s in range(6):
            pairs = ((int(first[s]), 0), (int(agreement.second[s]), 1))
            for teacher, column in pairs:
                if teacher >= 0:
                    target[s] += agreement.weight[s, column] * known[teacher][s]
        rest = 1 - target.sum(-1, keepdim=True)
        target += rest * logq.exp()
    kl = (target * (target.log() - logq)).sum(-1).mean()
    # the student's own part of the mixture is a constant
    wanted = gradient(student, ce + 0.7 * kl)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert {"loss", "ce", "kl"} == ours.keys()


def test_two_equal_teachers_are_one() -> None:
    packed, teacher = text(6), tiny("qwen2")
    agreement = made(
        teachers=[teacher, teacher],
        second=torch.ones(6, dtype=torch.int64),
        weight=torch.full((6, 2), 0.5),
    )
    first = torch.zeros(6, dtype=torch.int64)
    plain = Teaching(student=agreement.student, teachers=[teacher], beta=1.0)
    one, other = agreement.loss(packed.ids, first, 1, ROWS), plain.loss(packed.ids, first, 1)
    torch.testing.assert_close(one["loss"], other["loss"], rtol=1e-5, atol=1e-6)


def test_nobody_has_more_than_half_and_a_better_teacher_has_more() -> None:
    packed = text(12)
    knows, liar = tiny("qwen2", seed=1), tiny("qwen2", seed=3)
    optimizer = torch.optim.AdamW(knows.parameters(), 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        knows(packed.ids, labels=packed.ids).loss.backward()
        optimizer.step()
    affinity = torch.tensor([[0.1, 0.9], [0.9, 0.8], [0.9, -0.5]]).repeat(4, 1)
    teaching = Teaching(student=tiny("qwen2"), teachers=[knows, liar], beta=1.0)
    found = agreed(teaching, packed, affinity, threshold=0.0)
    assert found.second.tolist() == [0, 1, -1] * 4
    assert found.weight.max() <= CAP
    # the liar is nearest to the first kind, and yet weighs less than the one it has to share with
    assert (found.weight[0::3, 0] < found.weight[0::3, 1]).all()
    assert torch.equal(found.weight[2::3], torch.tensor([[CAP, 0.0]]).repeat(4, 1))


def test_texts_near_to_nobody_have_no_second_teacher() -> None:
    teaching = Teaching(student=tiny("qwen2"), teachers=[tiny("qwen2"), tiny("gpt2")], beta=1.0)
    found = agreed(teaching, text(3), torch.tensor([[0.1, 0.2]]).repeat(3, 1), threshold=0.3)
    assert found.second.tolist() == [-1] * 3
    assert not found.weight.any()
    loss = found.loss(text(3).ids, torch.full((3,), -1), 0, torch.arange(3))
    assert loss.keys() == {"loss", "ce"}


@pytest.mark.parametrize("agreement", [False, True])
def test_tuning_learns_with_it(agreement: bool) -> None:
    packed, base = text(12), tiny("qwen2")
    moe = merge([build.state_of(base)] * 2, base.config, MergeConfig(router_init="normal"), 7, None)
    before = copy_of(moe)
    config = TuneConfig(steps=2, batch_size=4, agreement=agreement, teacher_threshold=0.0)
    affinity = torch.tensor([[0.4, 0.3], [0.2, 0.5]]).repeat(6, 1)
    teachers = [tiny("qwen2", seed=3), tiny("gpt2", seed=4)]
    tuned = tune(
        moe,
        packed,
        config,
        MergeConfig(router_init="normal"),
        7,
        recorder=Recorder(None),
        teachers=teachers,
        affinity_SK=affinity,
    )
    moved = [name for name, one in tuned.state_dict().items() if not torch.equal(one, before[name])]
    assert moved
    assert not any(".experts." in name for name in moved)


def test_agreement_without_teachers_is_refused() -> None:
    given = {"tune": {"agreement": True, "teacher_weight": 0.0}}
    with pytest.raises(ConfigError, match=r"tune\.agreement must be false"):
        resolve(given)
    assert replace(TuneConfig(), agreement=True).agreement
