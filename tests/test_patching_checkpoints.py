"""What patched models keep: their state dicts, their saved form, and adapters upon them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deepfusion_kernels import patching
from tests.budget import assert_within_budget
from tests.tiny_moe import MODELS, build, tokens, transformers


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_state_dict_is_unchanged(name) -> None:
    """Names, order, values and even the storage; a plain model loads what a patched one gives."""
    model = build(name, MODELS[name])
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    patching.enable(model)
    state = model.state_dict()
    assert {key: value.data_ptr() for key, value in state.items()} == before
    assert list(state) == list(before)
    plain = build(name, MODELS[name])
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(plain(tokens()).logits, model(tokens()).logits)


def test_from_pretrained_with_the_key(name, tmp_path) -> None:
    """Saved without a trace of us; loaded with the key after `register` alone."""
    model = build(name, MODELS[name])
    model.save_pretrained(tmp_path / "plain")
    patching.enable(model)
    model.save_pretrained(tmp_path / "patched")
    for plain in (tmp_path / "plain").iterdir():
        assert (tmp_path / "patched" / plain.name).read_bytes() == plain.read_bytes(), plain.name
    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded = load(tmp_path / "patched", experts_implementation="deepfusion").eval()
    assert loaded.get_experts_implementation()[""] == patching.KEY
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)
    plain = load(tmp_path / "patched").eval()
    assert plain.get_experts_implementation()[""] != patching.KEY
    torch.testing.assert_close(plain(tokens()).logits, model(tokens()).logits)


class LowRank(nn.Module):
    """W + B A of every expert, as an adapter upon stacked weights adds it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        E, rows, columns = weight.shape
        draw = torch.Generator().manual_seed(rows)
        self.a = nn.Parameter(torch.randn(E, 2, columns, generator=draw) * 0.1)
        self.b = nn.Parameter(torch.randn(E, rows, 2, generator=draw) * 0.1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b.to(weight.dtype) @ self.a.to(weight.dtype)


def with_low_rank(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for module in list(model.modules()):
        if hasattr(type(module), "_apply_gate"):
            for weight in ("gate_up_proj", "down_proj"):
                adapter = LowRank(getattr(module, weight))
                parametrize.register_parametrization(module, weight, adapter)
    return model


def adapters(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every parameter that wants one."""
    ids = tokens()
    out = model(ids, labels=ids)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())
    return out.logits.detach(), grads


def compare(ours: nn.Module, eager: nn.Module, truth: nn.Module) -> None:
    (logits, grads), (plain, plain_grads), (exact, exact_grads) = map(
        adapters, (ours, eager, truth)
    )
    assert_within_budget(logits, plain, exact, "logits")
    assert grads.keys() == plain_grads.keys() == exact_grads.keys()
    floor = 2e-6 * max(float(grad.abs().max()) for grad in exact_grads.values())
    for key in grads:
        assert_within_budget(grads[key], plain_grads[key], exact_grads[key], key, floor)


@pytest.mark.parametrize("first", ("adapters", "enable"))
def test_low_rank_adapters_of_torch_learn_on_frozen_experts(name, first) -> None:
    models = [build(name, MODELS[name], dtype) for dtype in (torch.float32,) * 2 + (torch.float64,)]
    if first == "enable":
        assert set(patching.enable(models[0]).values()) == {"patched"}
    for model in models:
        with_low_rank(model)
    if first == "adapters":
        assert set(patching.enable(models[0]).values()) == {"patched"}
    compare(*models)


@pytest.mark.parametrize("first", ("adapters", "enable"))
def test_lora_of_peft_learns_on_frozen_experts(name, first) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    options: dict[str, Any] = {
        "r": 2,
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        # B would begin as zeros, and A without a gradient
        "init_lora_weights": False,
    }
    models = []
    for dtype in (torch.float32, torch.float32, torch.float64):
        model = build(name, MODELS[name], dtype)
        if not models and first == "enable":
            patching.enable(model)
        torch.manual_seed(3)
        models.append(peft.get_peft_model(model, peft.LoraConfig(**options)).to(dtype))
    if first == "adapters":
        assert set(patching.enable(models[0]).values()) == {"patched"}
    compare(*models)
