"""Tiny models of transformers with our experts and routers inside, and without them again."""

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_moe import COMMON, GPT_OSS, MODELS, build, tokens, transformers

from transformers.integrations import moe  # isort: skip

from deepfusion_kernels import patching
from tests.budget import assert_within_budget

RECORDS_LOGITS = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe")


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def run(model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, and the gradient of each parameter by name."""
    ids = tokens()
    asked = {"output_router_logits": True} if name in RECORDS_LOGITS else {}
    model.zero_grad()
    out = model(ids, labels=ids, **asked)
    out.loss.backward()
    outputs = {"loss": out.loss.detach(), "logits": out.logits.detach()}
    if asked:
        assert out.aux_loss > 0
        outputs["aux_loss"] = out.aux_loss.detach()
        outputs |= {f"router_{i}": z.detach() for i, z in enumerate(out.router_logits)}
    return outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_same_logits_gradients_and_router_logits(name) -> None:
    model, truth = build(name, MODELS[name]), build(name, MODELS[name], torch.float64)
    eager, eager_grads = run(model, name)
    exact, exact_grads = run(truth, name)
    told = patching.enable(model)
    assert told
    assert set(told.values()) == {"patched"}
    ours, our_grads = run(model, name)
    assert ours.keys() == eager.keys()
    assert our_grads.keys() == eager_grads.keys()
    for key in exact:
        assert_within_budget(ours[key], eager[key], exact[key], f"{name}: {key}")
    for key in exact_grads:
        floor = 2e-6 * max(float(grad.abs().max()) for grad in exact_grads.values())
        assert_within_budget(our_grads[key], eager_grads[key], exact_grads[key], key, floor)


def test_our_ops_are_really_called(name, monkeypatch) -> None:
    calls = {"experts": 0, "route": 0}
    experts, route = patching.moe_experts, patching.moe_route

    def count(kind, function):
        def wrapper(*args, **kwargs):
            calls[kind] += 1
            assert kwargs["backend"] == "reference"
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(patching, "moe_experts", count("experts", experts))
    monkeypatch.setattr(patching, "moe_route", count("route", route))
    model = build(name, MODELS[name])
    layers = len(patching.enable(model, "reference")) // 2
    model(tokens())
    assert calls == {"experts": layers, "route": layers}
    patching.disable(model)
    model(tokens())
    assert calls == {"experts": layers, "route": layers}


def test_generates_the_same_text(name) -> None:
    model = build(name, MODELS[name])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = model.generate(tokens(), **options)
    patching.enable(model)
    assert torch.equal(model.generate(tokens(), **options), before)


def test_disable_restores(name) -> None:
    model = build(name, MODELS[name])
    keys = {n: set(vars(m)) for n, m in model.named_modules()}
    before = model(tokens()).logits
    patching.enable(model)
    patching.enable(model)
    assert model.get_experts_implementation()[""] == patching.KEY
    patching.disable(model)
    patching.disable(model)
    assert model.get_experts_implementation()[""] == "eager"
    assert {n: set(vars(m)) for n, m in model.named_modules()} == keys
    assert torch.equal(model(tokens()).logits, before)


def test_gpt_oss_takes_the_fallback_and_says_so_once() -> None:
    model = build("gpt_oss", GPT_OSS)
    ids = tokens()
    before = model(ids).logits
    told = patching.enable(model)
    reasons = {n: why for n, why in told.items() if n.endswith("experts")}
    assert set(reasons.values()) == {"is_concatenated is False"}
    assert {why for n, why in told.items() if n not in reasons} == {"patched"}
    patching._say_once.cache_clear()
    with pytest.warns(UserWarning, match="GptOssExperts is served by transformers") as caught:
        after, _ = (model(ids).logits for _ in range(2))
    assert len([w for w in caught if "patching" in str(w.message)]) == 1
    torch.testing.assert_close(after, before)
    patching.disable(model)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    "change, reason",
    (
        ({"has_bias": True}, "has_bias is True"),
        ({"is_transposed": True}, "is_transposed is True"),
        ({"has_gate": False}, "has_gate is False"),
        ({"has_post_expert_norm": True}, "has_post_expert_norm is True"),
        ({"_apply_gate": lambda x: x}, "it has a gate of its own"),
        ({"act_fn": nn.ReLU()}, "its activation is ReLU"),
    ),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_guard(change, reason) -> None:
    experts = build("mixtral", MODELS["mixtral"]).model.layers[0].mlp.experts
    assert patching.why_not_experts(experts) is None
    for key, value in change.items():
        setattr(experts, key, value)
    assert patching.why_not_experts(experts) == reason


def test_guard_sees_a_gate_of_the_class() -> None:
    experts = build("mixtral", MODELS["mixtral"]).model.layers[0].mlp.experts
    experts.__class__ = type("Other", (type(experts),), {"_apply_gate": lambda self, x: x})
    assert patching.why_not_experts(experts) == "it has a gate of its own"


@pytest.mark.parametrize("act", ("silu", "gelu", "gelu_pytorch_tanh"))
def test_every_activation_of_the_guard_is_the_right_one(act) -> None:
    """A wrong name in the guard's table would show as another output."""
    model = build("mixtral", {**MODELS["mixtral"], "hidden_act": act})
    before = model(tokens()).logits
    assert set(patching.enable(model).values()) == {"patched"}
    torch.testing.assert_close(model(tokens()).logits, before)


def test_routers_of_others_are_left_alone() -> None:
    model = build("qwen2_moe", MODELS["qwen2_moe"])
    gates = [layer.mlp.gate for layer in model.model.layers]
    gates[0].forward = gates[0].forward
    gates[1].__class__ = type("Qwen2MoeTopKRouter", (type(gates[1]),), {})
    told = patching.enable(model)
    assert told["model.layers.0.mlp.gate"] == "its forward is already replaced"
    assert told["model.layers.1.mlp.gate"].startswith("a class of the same name")
    patching.disable(model)
    assert "forward" in vars(gates[0])


def test_a_dense_model_is_left_alone() -> None:
    config = transformers.AutoConfig.for_model("llama", **COMMON)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert patching.enable(model) == {}
    patching.disable(model)


def test_a_key_of_others_is_refused(monkeypatch) -> None:
    mapping = dict(moe.ALL_EXPERTS_FUNCTIONS._global_mapping)
    monkeypatch.setattr(type(moe.ALL_EXPERTS_FUNCTIONS), "_global_mapping", mapping)
    mapping[patching.KEY] = moe.batched_mm_experts_forward
    with pytest.raises(RuntimeError, match=r"'deepfusion' is held by transformers\.integrations"):
        patching.register()
    del mapping[patching.KEY]
    patching.register()
    patching.register()
    assert mapping[patching.KEY] is patching.experts_forward


def test_old_transformers_is_named(monkeypatch) -> None:
    monkeypatch.delattr(moe, "ALL_EXPERTS_FUNCTIONS")
    with pytest.raises(ImportError, match=r"transformers >= 5\.7"):
        patching.register()


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    block = build("qwen3_moe", MODELS["qwen3_moe"])
    patching.enable(block)
    mlp = block.model.layers[0].mlp
    hidden = torch.randn(1, 6, 32)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), mlp(hidden))
