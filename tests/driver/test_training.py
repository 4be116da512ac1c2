"""The training loop: what is optimised by what, and that a killed run ends in the same bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepfusion.config_tables import TrainingConfig
from deepfusion.metrics import Recorder
from deepfusion.models import build, moe
from deepfusion.step_checkpoint import StepCheckpoint
from deepfusion.training import (
    Muon,
    cross_entropy,
    lr_at,
    make_optimizer,
    matrices_of,
    train_causal_lm,
    train_steps,
)
from tests.budget import assert_within_budget
from tests.driver.tiny import copy_of, text, tiny

SCHEDULE = TrainingConfig(steps=12, batch_size=3, lr=0.02, optimizer="muon", checkpoint_steps=5)


def matrices(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    return parameters


def test_muon_is_torchs_muon() -> None:
    shapes = [(12, 40), (40, 12), (12, 40), (9, 9)]
    ours, theirs = matrices(*shapes), matrices(*shapes)
    mine = Muon(ours, lr=0.01, weight_decay=0.1)
    other = torch.optim.Muon(
        theirs, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        mine.step()
        other.step()
    for one, two, begun in zip(ours, theirs, matrices(*shapes), strict=True):
        moved = (two - begun).abs().max()
        # both round to bfloat16 in every product, in another order, and five rounds amplify it
        assert (one - two).abs().max() <= 2**-5 * moved
        assert moved > 0.01


def test_muon_takes_stacks_of_matrices_one_by_one() -> None:
    (stack,) = matrices((3, 8, 20))
    singles = [nn.Parameter(one.detach().clone()) for one in stack]
    for single, gradient in zip(singles, stack.grad, strict=True):
        single.grad = gradient.clone()
    Muon([stack], lr=0.01).step()
    Muon(singles, lr=0.01).step()
    assert torch.equal(stack, torch.stack(list(singles)))


def test_matrices_are_those_of_the_layers_without_routers() -> None:
    model = tiny("qwen2-tied")
    names = {id(p): n for n, p in model.named_parameters()}
    inside, rest = ([names[id(p)] for p in part] for part in matrices_of(model))
    assert sorted(inside + rest) == sorted(names.values())
    assert "model.embed_tokens.weight" in rest
    assert all(name.endswith("proj.weight") for name in inside)
    assert len(inside) == 2 * 7
    mixture = moe.new_moe(model.config, target="qwen2_moe", num_domains=4, top_k=2)
    names = {id(p): n for n, p in mixture.named_parameters()}
    inside, rest = ([names[id(p)] for p in part] for part in matrices_of(mixture))
    assert "model.layers.0.mlp.gate.weight" in rest
    assert "model.layers.0.mlp.experts.gate_up_proj" in inside
    assert not any("shared_expert" in name for name in inside + rest), "frozen is not trained"


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_weight_decay_reaches_matrices_only(name: str) -> None:
    model = tiny("qwen2")
    before = copy_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in make_optimizer(name, *matrices_of(model), lr=0.1, weight_decay=0.5):
        optimizer.step()
    for key, value in model.state_dict().items():
        factor = 0.95 if key.endswith("proj.weight") else 1.0
        assert torch.allclose(value, factor * before[key]), key


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 'muon' or 'adamw', got 'sgd'"):
        make_optimizer("sgd", [], [], lr=0.1)


def test_learning_rate_rises_and_falls() -> None:
    rates = [lr_at(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[50] == pytest.approx(1.0)
    assert max(rates) == rates[9] < 2.0
    assert 0 < rates[99] < 0.001


@pytest.mark.parametrize("kind", ["qwen2-tied", "llama", "gpt2"])
def test_cross_entropy_is_torchs(kind: str) -> None:
    model, exact = tiny(kind), tiny(kind).double()
    ids = text().ids[:4]

    def torchs(one: nn.Module) -> Tensor:
        logits = one(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def gradient(one: nn.Module, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, build.head_weight(one))[0]

    for kernels in ("reference", "auto"):
        ours, eager, truth = cross_entropy(model, ids, kernels), torchs(model), torchs(exact)
        assert_within_budget(ours, eager, truth, f"{kind} {kernels} loss")
        assert_within_budget(
            gradient(model, ours), gradient(model, eager), gradient(exact, truth), f"{kind} dhead"
        )


def train(
    model: nn.Module, path: Path | None = None, recorder: Recorder | None = None, **changes: object
) -> Recorder:
    recorder = recorder or Recorder(None)
    train_causal_lm(
        model,
        text(),
        replace(SCHEDULE, **changes),  # type: ignore[arg-type]
        stage="toy",
        seed=7,
        recorder=recorder,
        checkpoint_path=path,
    )
    return recorder


def test_training_lowers_the_loss_and_is_repeatable() -> None:
    first, second = tiny("llama"), tiny("llama")
    lines = train(first, steps=40).lines()
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    assert train(second, steps=40).lines() == lines
    assert all(torch.equal(v, first.state_dict()[k]) for k, v in second.state_dict().items())
    assert not first.training


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("killed_at", [3, 5, 11])
def test_a_killed_training_ends_in_the_same_bits(
    optimizer: str, killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # dropout needs random numbers in every step
    whole, broken = (tiny("gpt2", resid_pdrop=0.1) for _ in range(2))
    lines = train(whole, optimizer=optimizer).lines()
    recorder, path = Recorder(tmp_path / "metrics.jsonl"), tmp_path / "toy.safetensors"

    def dies(model: nn.Module, ids: Tensor, kernels: str) -> Tensor:
        if len(recorder.lines("toy")) == killed_at:
            raise KeyboardInterrupt
        return cross_entropy(model, ids, kernels)

    with monkeypatch.context() as patched:
        patched.setattr("deepfusion.training.cross_entropy", dies)
        with pytest.raises(KeyboardInterrupt):
            train(broken, path, recorder, optimizer=optimizer)
    assert path.exists() == (killed_at >= 5)
    again = tiny("gpt2", resid_pdrop=0.1)
    torch.manual_seed(99)
    assert train(again, path, recorder, optimizer=optimizer).lines("toy") == lines
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in again.state_dict().items())
    assert not path.exists()


def test_a_loss_that_is_not_finite_is_an_error_before_any_step() -> None:
    model = tiny("qwen2")
    before = copy_of(model)

    def loss_of(ids: Tensor, step: int) -> dict[str, Tensor]:
        return {"loss": cross_entropy(model, ids) * (float("nan") if step == 0 else 1)}

    with pytest.raises(FloatingPointError, match="toy: loss must be finite, got nan at step 0"):
        train_steps(
            {"model": model},
            make_optimizer("adamw", *matrices_of(model), lr=0.1),
            lambda start: iter([text().ids[:2]] * 12),
            loss_of,
            SCHEDULE,
            stage="toy",
            seed=7,
            recorder=Recorder(None),
        )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_every_named_term_is_recorded_and_a_checkpoint_stays_for_the_caller(
    tmp_path: Path,
) -> None:
    model, recorder = tiny("qwen2"), Recorder(None)
    checkpoint = StepCheckpoint(tmp_path / "toy.safetensors", 5)

    def loss_of(ids: Tensor, step: int) -> dict[str, Tensor]:
        loss = cross_entropy(model, ids)
        return {"loss": 2 * loss, "ce": loss}

    train_steps(
        {"model": model},
        make_optimizer("muon", *matrices_of(model), lr=0.01),
        lambda start: iter([text().ids[:2]] * (12 - start)),
        loss_of,
        SCHEDULE,
        stage="toy",
        seed=7,
        recorder=recorder,
        checkpoint=checkpoint,
    )
    lines = recorder.lines("toy")
    assert [line["step"] for line in lines] == list(range(12))
    assert all(line["loss"] == pytest.approx(2 * line["ce"]) for line in lines)
    assert checkpoint.path.exists()


def test_no_steps_leave_the_model_as_it_is() -> None:
    model = tiny("qwen2")
    before = copy_of(model)
    assert train(model, steps=0).lines() == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
