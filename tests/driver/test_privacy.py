"""DP-SGD on a device: its gradient, its accountant, its secret, what it says of itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepfusion.config import Config
from deepfusion.config_tables import DevicesConfig
from deepfusion.data.documents import Document
from deepfusion.data.encoding import make_encoder
from deepfusion.device.privacy import PrivateSteps, epsilon, private_gradient, secret_at
from deepfusion.device.train import train_device
from deepfusion.messages import Manifest, TrainedDevice
from deepfusion.metrics import Recorder
from deepfusion.models import build
from deepfusion.training import cross_entropy, train_causal_lm
from deepfusion.wire.package import write_package

from .tiny import copy_of, text, tiny
from .uploads import packed, rewrite

KINDS = ("gpt2", "llama", "qwen2-tied")
opacus = pytest.importorskip("opacus", reason="needs opacus: pip install 'deepfusion-moe[privacy]'")


def gradient(kind: str, ids: Tensor, **options: float) -> list[Tensor]:
    model = tiny(kind)
    parameters = list(model.parameters())
    wanted = {"clip": 1e9, "noise": 0.0, "expected": float(len(ids))} | options
    private_gradient(
        parameters,
        [one[None] for one in ids],
        lambda sample: cross_entropy(model, sample),
        draw=torch.Generator().manual_seed(3),
        **wanted,
    )
    return [one.grad for one in parameters if one.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_and_bound_it_is_the_gradient(kind: str) -> None:
    model, ids = tiny(kind), text(4).ids
    cross_entropy(model, ids).backward()
    for ours, plain in zip(gradient(kind, ids), model.parameters(), strict=True):
        assert plain.grad is not None
        assert torch.allclose(ours, plain.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence_moves_the_sum_by_at_most_the_bound(kind: str) -> None:
    """What the guarantee stands on: neighbouring batches differ by no more than dp_clip."""
    ids, clip = text(4).ids, 0.05
    with_it = gradient(kind, ids, clip=clip, expected=1.0)
    without = gradient(kind, ids[1:], clip=clip, expected=1.0)
    squares = [(a - b).square().sum() for a, b in zip(with_it, without, strict=True)]
    moved = float(torch.stack(squares).sum().sqrt())
    assert moved == pytest.approx(clip, rel=1e-3)
    unbounded = gradient(kind, ids, expected=1.0)
    squares = [a.square().sum() for a in unbounded]
    assert float(torch.stack(squares).sum().sqrt()) > 10 * clip


def test_noise_has_the_size_it_says() -> None:
    clip, noise, ids = 0.1, 3.0, text(2).ids
    quiet = gradient("gpt2", ids, clip=clip, expected=8.0)
    noisy = gradient("gpt2", ids, clip=clip, noise=noise, expected=8.0)
    difference = torch.cat([(a - b).flatten() for a, b in zip(noisy, quiet, strict=True)])
    assert float(difference.std()) == pytest.approx(noise * clip / 8.0, rel=0.03)
    assert abs(float(difference.mean())) < 4 * noise * clip / 8.0 / difference.numel() ** 0.5


def test_training_without_noise_and_bound_is_plain_training() -> None:
    """The same batches, whole loops: equal to rounding (AdamW, few steps)."""
    schedule = DevicesConfig(steps=4, batch_size=3, lr=1e-3, optimizer="adamw", clip=1e9)
    sequences, states = text(9), []
    for is_private in (False, True):
        model = tiny("llama")
        more = {}
        if is_private:
            bare = replace(schedule, dp_noise=0.0, dp_clip=1e9)
            private = PrivateSteps(model, sequences, bare, 1, "auto")
            more = {"loss_of": private.loss_of}
        train_causal_lm(
            model, sequences, schedule, stage="s", seed=7, recorder=Recorder(None), **more
        )
        states.append(copy_of(model))
    for name, plain in states[0].items():
        assert torch.allclose(states[1][name], plain, atol=2e-5), name


def test_sequences_are_drawn_independently_and_in_secret() -> None:
    sequences = text(200)
    schedule = DevicesConfig(steps=400, batch_size=8)
    one = PrivateSteps(tiny("gpt2"), sequences, schedule, 1, "auto")
    sizes = [len(batch) for batch in one.batches(0)]
    mean = sum(sizes) / len(sizes)
    assert mean == pytest.approx(8, abs=0.6)
    spread = sum((size - mean) ** 2 for size in sizes) / len(sizes)
    assert spread == pytest.approx(200 * 0.04 * 0.96, rel=0.25), "a fixed size would have none"
    later = [len(batch) for batch in one.batches(390)]
    assert later == sizes[390:], "a resumed training draws what it would have drawn"
    other = PrivateSteps(tiny("gpt2"), sequences, schedule, 2, "auto")
    assert [len(batch) for batch in other.batches(0)] != sizes


def test_epsilon_is_the_accountants() -> None:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for _ in range(150):
        accountant.step(noise_multiplier=1.1, sample_rate=0.02)
    spent = epsilon(1.1, 0.02, 150, 1e-5)
    assert spent == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
    assert epsilon(2.2, 0.02, 150, 1e-5) < spent < epsilon(1.1, 0.02, 600, 1e-5)


def test_secret_outlives_a_kill_and_is_nobodys_seed(tmp_path: Path) -> None:
    kept = secret_at(tmp_path / "a.secret")
    assert kept == secret_at(tmp_path / "a.secret")
    assert len({kept, secret_at(tmp_path / "b.secret"), secret_at(None)}) == 3


def device(noise: float, tmp_path: Path, tiny_tokenizer: object) -> TrainedDevice:
    config = Config()
    schedule = replace(config.devices, steps=3, batch_size=2, dp_noise=noise)
    config = replace(
        config, devices=schedule, data=replace(config.data, context_length=16, vocab_size=300)
    )
    start = build.state_of(
        build.build("gpt2", len(tiny_tokenizer), torch.Generator().manual_seed(0), 16, 0)  # type: ignore[arg-type]
    )
    documents = [Document(f"text number {n} of a device " * 4, str(n), "d", "t") for n in range(9)]
    return train_device(
        "gpt2",
        start,
        documents,
        tiny_tokenizer,
        config,
        "device-00",
        make_encoder(config.embedding, None),
        Recorder(None),
        tmp_path / "steps.safetensors",
    )


def test_manifest_tells_epsilon_or_nothing(tmp_path: Path) -> None:
    from deepfusion.data.corpora import train_tokenizer

    tokenizer = train_tokenizer(["text number of a device 0123456789"] * 50, 300)
    plain = device(0.0, tmp_path, tokenizer)
    assert write_package(plain, tmp_path / "plain", "bf16").privacy == {}
    one, other = (device(1.5, tmp_path, tokenizer) for _ in range(2))
    said = write_package(one, tmp_path / "private", "bf16").privacy
    assert said["epsilon"] == epsilon(1.5, said["rate"], 3, 1e-5) > 0
    manifest = Manifest.from_json((tmp_path / "private" / "manifest.json").read_text())
    assert manifest.privacy == said
    assert any(not torch.equal(one.state[name], other.state[name]) for name in one.state), (
        "noise that the seed gives away hides nothing"
    )
    assert not list(tmp_path.glob("*.secret"))


@pytest.mark.parametrize(
    "privacy, wanted",
    [
        ({"epsilon": 1.0}, "manifest: privacy: key 'clip' is missing"),
        (dict.fromkeys(("epsilon", "delta", "noise", "clip", "rate", "steps"), -1.0), "finite"),
    ],
)
def test_odd_claims_are_refused(tmp_path: Path, privacy: dict[str, float], wanted: str) -> None:
    from .uploads import assert_refused

    packed(tmp_path / "up")
    rewrite(tmp_path / "up", privacy=privacy)
    assert_refused(tmp_path / "up", wanted)
