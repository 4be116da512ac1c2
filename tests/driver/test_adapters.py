"""Low-rank uploads: what learns, what travels, what the gate refuses, what the server merges."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepfusion.messages import Content, TrainedDevice, UploadRefused
from deepfusion.models import build, lora
from deepfusion.wire import adapters
from deepfusion.wire.codecs import CODECS
from deepfusion.wire.contents import sent
from deepfusion.wire.expected import ArchitectureSpec, Expected
from deepfusion.wire.gate import inspect
from deepfusion.wire.norms import check_norms
from deepfusion.wire.package import read_state, state_revision, write_package

from .tiny import logits, text, tiny
from .uploads import edit_shard

pytest.importorskip("peft", reason="adapters need peft: pip install 'deepfusion-moe[lora]'")

RANK = 3
CONTENT = Content("adapter", RANK)
KINDS = ("gpt2", "llama", "qwen2", "qwen2-tied")


def start(kind: str) -> dict[str, Tensor]:
    return build.state_of(tiny(kind))


def drawn(kind: str, size: float = 0.3, seed: int = 5) -> dict[str, Tensor]:
    """Factors as a training would leave them."""
    draw = torch.Generator().manual_seed(seed)
    zeros = sent(CONTENT, start(kind))
    return {name: size * torch.randn(zeros[name].shape, generator=draw) for name in zeros}


def trained(kind: str, device: str = "device-00", **changes: Tensor) -> TrainedDevice:
    base = start(kind)
    return TrainedDevice(
        device=device,
        architecture=kind,
        state=drawn(kind, seed=hash(device) % 100) | changes,
        base=sent(CONTENT, base),
        base_revision=state_revision(base),
        embedding=torch.arange(1.0, 17.0),
        tokens=100,
        tokenizer_fingerprint="fp",
        seed=0,
        content=CONTENT,
    )


def expected(kind: str, codec: str = "delta-int8", **more: float) -> Expected:
    base = start(kind)
    spec = ArchitectureSpec.of(base, codec, state_revision(base), content=CONTENT)
    return Expected({kind: spec}, "fp", codec, 16, content=CONTENT, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_begin_at_the_start_and_learn_alone(kind: str) -> None:
    model, ids = tiny(kind), text().ids
    before = logits(model, ids)
    names = adapters.adapted(build.state_of(model))
    lora.add(model, names, RANK, torch.Generator().manual_seed(1))
    assert torch.allclose(logits(model, ids), before, atol=1e-5)
    learning = [name for name, one in model.named_parameters() if one.requires_grad]
    assert len(learning) == 2 * len(names) > 0
    assert all("lora_" in name for name in learning)
    again = tiny(kind)
    lora.add(again, names, RANK, torch.Generator().manual_seed(1))
    for (_, one), (_, other) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_is_the_adapted_one(kind: str) -> None:
    """gpt2 stores its matrices turned: the factors that travel are as the tensors are stored."""
    model, ids = tiny(kind), text().ids
    base = build.state_of(model)
    names = adapters.adapted(base)
    lora.add(model, names, RANK, torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.add_(0.2 * torch.randn(one.shape, generator=draw))
    wanted = logits(model, ids)
    factors = {}
    for name, (left, right) in lora.factors(model, names).items():
        factors[name + adapters.LEFT], factors[name + adapters.RIGHT] = left, right
    assert {name: one.shape for name, one in factors.items()} == {
        name: one.shape for name, one in sent(CONTENT, base).items()
    }
    whole = tiny(kind, seed=9)
    build.load_state(whole, adapters.merged(base, factors))
    assert torch.allclose(logits(whole, ids), wanted, rtol=1e-4, atol=1e-4)
    build.load_state(whole, base)
    assert not torch.allclose(logits(whole, ids), wanted, atol=0.1)


@pytest.mark.parametrize("codec", CODECS)
def test_upload_is_merged_into_the_base(tmp_path: Path, codec: str) -> None:
    one = trained("qwen2-tied")
    manifest = write_package(one, tmp_path / "up", codec)
    update = inspect(tmp_path / "up", expected("qwen2-tied", codec), "device-00")
    base = start("qwen2-tied")
    found, wanted = (
        read_state(tmp_path / "up", manifest, base),
        adapters.merged(base, one.state),
    )
    assert found.keys() == base.keys()
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"]
    for name in base:
        moved = wanted[name] - base[name]
        assert torch.allclose(
            found[name], wanted[name], atol=0.03 * float(moved.abs().max()) + 1e-7
        )
        if name in update.norms:
            assert update.norms[name] == pytest.approx(float(moved.norm()), rel=0.02)
            assert float(moved.norm()) > 0
        else:
            assert torch.equal(found[name], base[name])
    sizes = sum(path.stat().st_size for path in (tmp_path / "up").glob("*.safetensors"))
    assert sizes < 4 * sum(tensor.numel() for tensor in one.state.values())


def refused(folder: Path, wanted: str, kind: str = "qwen2", **more: float) -> None:
    with pytest.raises(UploadRefused, match=wanted):
        inspect(folder, expected(kind, **more), "device-00")


FIRST = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "edit, wanted",
    [
        (lambda t: t.pop(f"{FIRST}@left#q#0"), "must have part 'q' of 2"),
        (
            lambda t: t.update({"lm_head.weight@left#q#0": t[f"{FIRST}@left#q#0"].clone()}),
            "tensor 'lm_head.weight@left' does not belong to qwen2",
        ),
        (
            lambda t: t.update({f"{FIRST}@left#q#0": t[f"{FIRST}@left#q#0"][:-1].clone()}),
            rf"tensor '{FIRST}@left' part 'q' must be torch.int8 \[96\]",
        ),
        (
            lambda t: t[f"{FIRST}@right#scale#0"].fill_(float("nan")),
            f"tensor '{FIRST}@right' holds 3 non-finite block scales",
        ),
    ],
)
def test_hostile_factors(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], wanted: str
) -> None:
    write_package(trained("qwen2"), tmp_path / "up", "delta-int8")
    edit_shard(tmp_path / "up", lambda tensors: None, f"{FIRST}@left#q#0")
    inspect(tmp_path / "up", expected("qwen2"), "device-00")
    edit_shard(tmp_path / "up", edit, f"{FIRST}@left#q#0")
    refused(tmp_path / "up", wanted)


def test_norm_is_that_of_the_merged_update(tmp_path: Path) -> None:
    write_package(trained("qwen2"), tmp_path / "up", "delta-int8")
    norms = inspect(tmp_path / "up", expected("qwen2"), "device-00").norms
    largest = max(norms, key=lambda name: norms[name])
    inspect(tmp_path / "up", expected("qwen2", max_update_norm=norms[largest] * 1.01), "device-00")
    refused(
        tmp_path / "up",
        "must differ from the base by at most",
        max_update_norm=norms[largest] * 0.99,
    )


def test_product_beyond_float32_is_refused(tmp_path: Path) -> None:
    """Each factor is finite; what the merge would add is not."""
    left, right = (f"{FIRST}{end}" for end in (adapters.LEFT, adapters.RIGHT))
    huge = {name: torch.full_like(drawn("qwen2")[name], 1e30) for name in (left, right)}
    write_package(trained("qwen2", **huge), tmp_path / "up", "bf16")
    with pytest.raises(UploadRefused, match=f"tensor '{FIRST}' must differ from the base by less"):
        inspect(tmp_path / "up", expected("qwen2", "bf16"), "device-00")


def test_scaled_adapter_fails_the_median_rule(tmp_path: Path) -> None:
    updates = []
    for name, scale in (("device-00", 1.0), ("device-01", 1.0), ("device-02", 40.0)):
        one = trained("qwen2", name)
        scaled = {
            key: scale * value if key.endswith(adapters.LEFT) else value
            for key, value in one.state.items()
        }
        write_package(trained("qwen2", name, **scaled), tmp_path / name, "delta-int8")
        updates.append(inspect(tmp_path / name, expected("qwen2"), name))
    assert set(check_norms(updates).refused) == {"device-02"}


def test_other_rank_or_whole_model_is_refused(tmp_path: Path) -> None:
    write_package(trained("qwen2"), tmp_path / "up", "delta-int8")
    base = start("qwen2")
    for content in (Content("adapter", 2), Content()):
        spec = ArchitectureSpec.of(base, "delta-int8", state_revision(base), content=content)
        other = Expected({"qwen2": spec}, "fp", "delta-int8", 16, content=content)
        with pytest.raises(UploadRefused, match=r"content must be .*adapter.*rank=3"):
            inspect(tmp_path / "up", other, "device-00")


def test_impossible_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rank must be in \[1, \d+\] .* got 33"):
        adapters.factors(start("qwen2"), 33)
    with pytest.raises(ValueError, match="matrices inside numbered layers, got none"):
        adapters.factors({"weight": torch.zeros(3, 3)}, 1)
