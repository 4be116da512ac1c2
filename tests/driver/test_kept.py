"""The likeliest tokens instead of a model: their package, the gate's rows, what they teach."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepfusion.config import Config
from deepfusion.device.answer import Answers
from deepfusion.device.train import _answered
from deepfusion.messages import Content, DeviceUpdate, Manifest, TrainedDevice, UploadRefused
from deepfusion.server.fit import fit
from deepfusion.server.kept import KeptText, mean_kept, mean_of
from deepfusion.server.teaching import Teaching
from deepfusion.wire import kept
from deepfusion.wire.contents import sent
from deepfusion.wire.expected import ArchitectureSpec, Expected, load_expected, save_expected
from deepfusion.wire.gate import inspect
from deepfusion.wire.package import Sent, read_state, state_revision, write_package

from .tiny import LENGTH, VOCAB, logits, text, tiny
from .uploads import edit_shard, reseal

PUBLIC = text(9)
START = {"weight": torch.ones(3)}
TOP_K = 5
SHARD_BYTES = 1200


def content(top_k: int = TOP_K) -> Content:
    ids = PUBLIC.ids
    return Content(
        kind="logprobs",
        top_k=top_k,
        rows=ids.shape[0] * (ids.shape[1] - 1),
        vocabulary=VOCAB,
        text=state_revision({"ids": ids.int()}),
    )


def trained(top_k: int = TOP_K, seed: int = 0, device: str = "device-00") -> TrainedDevice:
    model = tiny("gpt2", seed)
    asked = content(top_k)
    return TrainedDevice(
        device=device,
        architecture="gpt2",
        state=Answers(model, PUBLIC.ids, asked, batch_size=4),
        base=sent(asked, {}),
        base_revision=state_revision(START),
        embedding=torch.arange(1.0, 17.0),
        tokens=100,
        tokenizer_fingerprint="fp",
        seed=seed,
        content=asked,
    )


def expected(top_k: int = TOP_K) -> Expected:
    asked = content(top_k)
    spec = ArchitectureSpec.of(START, "delta-int8", state_revision(START), content=asked)
    return Expected({"gpt2": spec}, "fp", "delta-int8", 16, shard_bytes=SHARD_BYTES, content=asked)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kept, "BLOCK_ROWS", 32)
    write_package(trained(), tmp_path / "up", "delta-int8", SHARD_BYTES)
    return tmp_path / "up"


def answers_of(seed: int, top_k: int) -> dict[str, Tensor]:
    one = Answers(tiny("gpt2", seed), PUBLIC.ids, content(top_k), batch_size=4)
    return {part: torch.cat([one[name] for name in one if name.endswith(part)])
            for part in (kept.IDS, kept.LOGPROBS)}  # fmt: skip


def test_package_holds_what_the_model_says(folder: Path) -> None:
    update = inspect(folder, expected(), "device-00")
    assert len(update.manifest.shards) > 1
    assert update.norms == {}
    found = Sent(folder, update.manifest, {})
    assert len(found) == 2 * 4, "99 rows in blocks of 32"
    ids = torch.cat([found[name] for name in found if name.endswith(kept.IDS)])
    values = torch.cat([found[name] for name in found if name.endswith(kept.LOGPROBS)])
    wanted = logits(tiny("gpt2"), PUBLIC.ids)[:, :-1].log_softmax(-1).flatten(0, 1).topk(TOP_K)
    assert (ids.dtype, values.dtype) == (torch.int16, torch.half)
    assert torch.equal(ids.long(), wanted.indices)
    assert torch.allclose(values.float(), wanted.values, atol=1e-5, rtol=2**-10)
    with pytest.raises(ValueError, match="device-00: must hold a model, got logprobs"):
        read_state(folder, update.manifest, {})


def test_rounding_goes_down_and_keeps_the_order() -> None:
    values = torch.linspace(-12, 0, 5000).flip(0)
    half = kept.half_down(values)
    assert (half.float() <= values).all()
    assert (half[1:] <= half[:-1]).all()
    assert torch.allclose(half.float(), values, rtol=2**-10, atol=1e-6)


def test_expected_survives_the_disk(tmp_path: Path, folder: Path) -> None:
    save_expected(tmp_path / "expected", expected())
    inspect(folder, load_expected(tmp_path / "expected"), "device-00")


def put(name: str, row: int, values: list[float]) -> Callable[[dict[str, Tensor]], object]:
    def edit(tensors: dict[str, Tensor]) -> None:
        flat = tensors[name]
        flat[row * TOP_K : (row + 1) * TOP_K] = torch.tensor(values).to(flat.dtype)

    return edit


@pytest.mark.parametrize(
    "part, values, wanted",
    [
        ("ids", [0, 1, 2, 3, VOCAB], rf"must hold ids in \[0, {VOCAB}\), got {VOCAB}"),
        ("ids", [0, 1, 2, 3, -1], rf"must hold ids in \[0, {VOCAB}\), got -1"),
        ("ids", [0, 1, 2, 3, 3], "holds 1 rows that name a token twice"),
        ("logprobs", [-1.0, -2.0, float("nan"), -3.0, -4.0], "holds 1 non-finite values"),
        ("logprobs", [-1.0, -2.0, -3.0, -4.0, float("-inf")], "holds 1 non-finite values"),
        ("logprobs", [-2.0, -1.0, -3.0, -4.0, -5.0], "holds 1 rows that do not descend"),
        ("logprobs", [-0.1, -0.5, -3.0, -4.0, -5.0], "rows that sum to at most 1, got 1.58"),
        ("logprobs", [90.0, -0.5, -3.0, -4.0, -5.0], "rows that sum to at most 1"),
    ],
)
def test_hostile_rows(folder: Path, part: str, values: list[float], wanted: str) -> None:
    name = f"000001.{part}#raw#0"
    edit_shard(folder, lambda tensors: None, name)
    inspect(folder, expected(), "device-00")
    edit_shard(folder, put(name, 3, values), name)
    with pytest.raises(UploadRefused, match=f"tensor '000001.{part}' .*{wanted}"):
        inspect(folder, expected(), "device-00")


def test_counts_and_text_are_those_agreed(folder: Path) -> None:
    for change in ({"rows": 98}, {"top_k": 4}, {"vocabulary": 60}, {"text": "other"}):
        other = replace(expected(), content=replace(content(), **change))  # type: ignore[arg-type]
        with pytest.raises(UploadRefused, match="device-00: content must be "):
            inspect(folder, other, "device-00")
    edit_shard(folder, lambda tensors: tensors.pop("000003.ids#raw#0"), "000003.ids#raw#0")
    with pytest.raises(UploadRefused, match=r"tensor '000003.ids' is missing"):
        inspect(folder, expected(), "device-00")


def test_short_block(folder: Path) -> None:
    name = "000001.ids#raw#0"
    edit_shard(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}), name)
    reseal(folder)
    with pytest.raises(UploadRefused, match=r"part 'raw' must be torch.int16 \[160\]"):
        inspect(folder, expected(), "device-00")


def test_top_k_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k must be in \[1, 61\], got 62"):
        kept.shapes(content(VOCAB + 1))


def test_device_refuses_another_text() -> None:
    model, asked, config = tiny("gpt2"), content(), Config()
    assert _answered(model, asked, PUBLIC.ids.int(), config) is not None
    for other in (None, PUBLIC.ids.int().flip(0)):
        with pytest.raises(ValueError, match=f"public text must be revision {asked.text[:12]}"):
            _answered(model, asked, other, config)


def test_mean_of_whole_distributions_is_the_mean() -> None:
    both = [answers_of(seed, VOCAB) for seed in (0, 1)]
    shares = [0.25, 0.75]
    ids, values = mean_of([o["ids"] for o in both], [o["logprobs"] for o in both], shares)
    dense = [logits(tiny("gpt2", seed), PUBLIC.ids)[:, :-1].softmax(-1) for seed in (0, 1)]
    mean = (0.25 * dense[0] + 0.75 * dense[1]).flatten(0, 1)
    assert torch.allclose(values.float().exp(), mean.gather(1, ids.long()), rtol=1e-2)
    assert torch.equal(ids.long().sort(1).values, torch.arange(VOCAB).expand_as(ids))
    assert (values[:, 1:] <= values[:, :-1]).all()


def test_mean_of_few_tokens_is_a_lower_bound() -> None:
    both = [answers_of(seed, TOP_K) for seed in (0, 1)]
    ids, values = mean_of([o["ids"] for o in both], [o["logprobs"] for o in both], [0.5, 0.5])
    dense = [logits(tiny("gpt2", seed), PUBLIC.ids)[:, :-1].softmax(-1) for seed in (0, 1)]
    mean = (0.5 * (dense[0] + dense[1])).flatten(0, 1).gather(1, ids.long())
    assert ids.shape == (99, TOP_K)
    assert (values.float().exp() <= mean * (1 + 1e-5)).all()
    for part in (ids, values):
        kept.check("ids" if part is ids else "logprobs", part, content())


def updates(tmp_path: Path, top_k: int) -> list[DeviceUpdate]:
    found = []
    for seed in (0, 1):
        name = f"device-{seed:02d}"
        one = replace(trained(top_k, seed, name))
        write_package(one, tmp_path / name, "delta-int8", 1 << 20)
        expects = replace(expected(top_k), shard_bytes=1 << 20)
        found.append(inspect(tmp_path / name, expects, name))
    return found


def test_cluster_averages_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "BLOCK_ROWS", 40)
    both = updates(tmp_path, TOP_K)
    found = mean_kept(both, lambda update: Sent(update.folder, update.manifest, {}))
    monkeypatch.setattr(kept, "BLOCK_ROWS", 8192)
    parts = [answers_of(seed, TOP_K) for seed in (0, 1)]
    ids, values = mean_of([o["ids"] for o in parts], [o["logprobs"] for o in parts], [0.5, 0.5])
    assert torch.equal(found["ids"], ids)
    assert torch.equal(found["logprobs"], values)


def test_teaches_as_the_model_does() -> None:
    """With the whole vocabulary kept the loss and its gradient are those of the model itself."""
    teacher, rows = tiny("gpt2", 1), torch.tensor([7, 2, 4])
    answers = answers_of(1, VOCAB)
    # float32 instead of what crosses the wire, so that only rounding is left
    dense = logits(teacher, PUBLIC.ids)[:, :-1].log_softmax(-1).flatten(0, 1)
    answers["logprobs"] = dense.gather(1, answers["ids"].long())
    losses, gradients = [], []
    for one in (teacher, KeptText(answers, PUBLIC.ids)):
        student = tiny("qwen2", 0)
        teaching = Teaching(student, [one], beta=0.7)
        terms = teaching.loss(PUBLIC.ids[rows], torch.tensor([-1, 0, 0]), 0, rows)
        terms["loss"].backward()
        losses.append(terms)
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    assert losses[0].keys() == losses[1].keys() == {"loss", "ce", "kl"}
    for name in losses[0]:
        assert float(losses[1][name].detach()) == pytest.approx(
            float(losses[0][name].detach()), rel=1e-4
        )
    for ours, wanted in zip(gradients[1], gradients[0], strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-3, atol=1e-5)


def test_teaching_refuses_what_answers_cannot_give() -> None:
    answers = KeptText(answers_of(1, TOP_K), PUBLIC.ids)
    Teaching(tiny("qwen2"), [answers], beta=1.0)
    with pytest.raises(ValueError, match=r"teach at temperature 1.*got temperature 2.0"):
        Teaching(tiny("qwen2"), [answers], beta=1.0, temperature=2.0)


def test_fit_of_answers_is_the_models() -> None:
    models = [tiny("gpt2", seed) for seed in (0, 1)]
    answers = [KeptText(answers_of(seed, VOCAB), PUBLIC.ids) for seed in (0, 1)]
    rows = torch.tensor([0, 3, 8])
    ours, wanted = (fit(some, PUBLIC, 4, rows) for some in (answers, models))
    assert torch.allclose(ours, wanted, atol=2e-4)
    assert (ours[rows] != 0).any()


def test_manifest_round_trip(folder: Path) -> None:
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    assert manifest.content == content()
    assert content().rows / len(PUBLIC) == LENGTH - 1
