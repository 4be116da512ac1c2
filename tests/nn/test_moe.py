"""MoELayer against the upstream block, the dense identity, and its life in training."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deepfusion_kernels import Routing
from deepfusion_kernels.nn import MoEConfig, MoELayer
from tests.budget import assert_within_budget

D, F, E, K = 24, 20, 6, 2
LOSSES = {"balance_loss_weight": 0.1, "z_loss_weight": 0.01}


def upstream_block(shared_width: int = 28, **options):
    """Qwen2-MoE's block of transformers."""
    transformers = pytest.importorskip("transformers", minversion="5.7")
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = transformers.Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        shared_expert_intermediate_size=shared_width,
        num_experts=E,
        num_experts_per_tok=K,
        experts_implementation="eager",
        **options,
    )
    return Qwen2MoeSparseMoeBlock(config)


@pytest.mark.parametrize("renormalize", (False, True))
def test_equals_the_upstream_block_with_the_same_names(renormalize) -> None:
    """Qwen2-MoE's block loads our state dict, strictly, and gives the same output and gradients."""
    layer = MoELayer(D, F, E, K, shared_width=28, renormalize=renormalize)
    block, truth = (upstream_block(norm_topk_prob=renormalize) for _ in range(2))
    truth = truth.double()
    block.load_state_dict(layer.state_dict())
    truth.load_state_dict(layer.state_dict())
    hidden = torch.randn(3, 5, D)
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    leaves.append(hidden.double().requires_grad_())
    out, routing = layer(leaves[0])
    assert isinstance(routing, Routing)
    outs = [out, block(leaves[1]), truth(leaves[2])]
    assert_within_budget(*(x.detach() for x in outs), "out")
    pull = torch.randn(3, 5, D)
    for x in outs:
        (x * pull.to(x.dtype)).sum().backward()
    assert_within_budget(*(x.grad for x in leaves), "dhidden")
    for name in dict(layer.named_parameters()):
        grads = (m.get_parameter(name).grad for m in (layer, block, truth))
        assert_within_budget(*grads, f"d{name}")


def test_balance_loss_is_the_upstream_one() -> None:
    """One layer's load_balancing_loss_func of transformers, in value and router gradient."""
    pytest.importorskip("transformers", minversion="5.7")
    from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

    layer = MoELayer(D, F, E, K, balance_loss_weight=1.0)
    hidden = torch.randn(31, D)
    theirs = load_balancing_loss_func((layer.gate(hidden),), E, K)
    ours = layer(hidden)[1].aux_loss
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(loss, layer.gate.weight)[0] for loss in (ours, theirs)]
    assert grads[0].abs().max() > 1e-4
    torch.testing.assert_close(*grads)


def test_loads_one_matrix_an_expert() -> None:
    """The layout of published checkpoints; a missing matrix is named, not made up."""
    layer, other = (MoELayer(D, F, E, K, shared_width=28) for _ in range(2))
    state = {n: x for n, x in layer.state_dict().items() if not n.startswith("experts.")}
    for e in range(E):
        gate, up = layer.experts.gate_up_proj.detach()[e].chunk(2)
        down = layer.experts.down_proj.detach()[e]
        for kind, matrix in {"gate": gate, "up": up, "down": down}.items():
            state[f"experts.{e}.{kind}_proj.weight"] = matrix
    other.load_state_dict(state)
    for name, parameter in layer.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name
    del state["experts.3.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"experts\.gate_up_proj"):
        other.load_state_dict(state)


def test_config_survives_json_and_builds_the_same_layer() -> None:
    config = MoEConfig(
        D, F, E, K, shared_width=8, selection_bias=True, score="sigmoid", renormalize=True,
        scale=2.5, num_groups=3, top_groups=2, group_score="top2_sum", **LOSSES,
    )  # fmt: skip
    again = MoEConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config
    layer = MoELayer.from_config(again, backend="reference")
    other = MoELayer(**asdict(config))
    other.load_state_dict(layer.state_dict())
    hidden = torch.randn(7, D)
    (ours, routing), (out, others) = layer(hidden), other(hidden)
    torch.testing.assert_close(ours, out)
    assert torch.equal(routing.experts, others.experts)
    assert routing.weights.sum(1).tolist() == pytest.approx([2.5] * 7)
    assert layer.backend == "reference"


def test_config_says_every_option_of_the_layer() -> None:
    """An option of moe_route that the config forgets could not be saved."""
    import inspect

    from deepfusion_kernels import moe_route

    options = set(inspect.signature(moe_route).parameters) - {"router_logits", "backend"}
    layer = {"hidden_width", "expert_width", "num_experts", "shared_width", "activation"}
    assert options | layer == set(MoEConfig.__dataclass_fields__)


@pytest.mark.parametrize("activation", ("silu", "gelu", "gelu_tanh"))
def test_equal_experts_are_the_dense_mlp(activation) -> None:
    """All experts alike, renormalised weights: whatever the router does, a dense MLP is left."""
    layer = MoELayer(D, F, E, K, activation=activation, renormalize=True).double()
    with torch.no_grad():
        for stacked in layer.experts.parameters():
            stacked.copy_(stacked[:1].expand_as(stacked).clone())
    hidden = torch.randn(7, D, dtype=torch.float64)
    g, u = (hidden @ layer.experts.gate_up_proj[0].T).chunk(2, dim=-1)
    act = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }[activation]
    dense = (act(g) * u) @ layer.experts.down_proj[0].T
    torch.testing.assert_close(layer(hidden)[0], dense, rtol=1e-12, atol=1e-12)


def test_losses_reach_the_router_alone() -> None:
    layer = MoELayer(D, F, E, K, **LOSSES)
    layer(torch.randn(9, D))[1].aux_loss.backward()
    assert layer.gate.weight.grad.abs().max() > 0
    assert layer.experts.gate_up_proj.grad is None


def test_selection_bias_moves_the_choice_and_is_no_parameter() -> None:
    layer = MoELayer(D, F, E, K, selection_bias=True, score="sigmoid", renormalize=True)
    assert "gate.e_score_correction_bias" in dict(layer.named_buffers())
    layer.gate.e_score_correction_bias[4] = 10.0
    _, routing = layer(torch.randn(9, D))
    assert routing.counts[4] == 9


def test_router_logits_stay_float32_under_autocast_and_in_bfloat16() -> None:
    layer = MoELayer(D, F, E, K, **LOSSES)
    hidden = torch.randn(9, D)
    _, plain = layer(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lowered = layer(hidden)
    assert out.dtype == torch.bfloat16
    assert all(map(torch.equal, plain, lowered))
    out, routing = layer.to(torch.bfloat16)(hidden.bfloat16())
    assert out.dtype == torch.bfloat16
    assert routing.weights.dtype == routing.aux_loss.dtype == torch.float32


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_recomputes_the_same_routing(reentrant) -> None:
    layer = MoELayer(D, F, E, K, shared_width=8, **LOSSES)

    def loss(hidden: Tensor) -> Tensor:
        out, routing = layer(hidden)
        return out.square().sum() + routing.aux_loss

    hidden = torch.randn(9, D)
    grads = []
    for recompute in (False, True):
        leaf = hidden.clone().requires_grad_()
        value = checkpoint(loss, leaf, use_reentrant=reentrant) if recompute else loss(leaf)
        layer.zero_grad()
        value.backward()
        grads.append((leaf.grad, *(p.grad.clone() for p in layer.parameters())))
    assert all(map(torch.equal, *grads))


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    layer = MoELayer(D, F, E, K, shared_width=8, **LOSSES)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    hidden = torch.randn(2, 5, D, requires_grad=True)
    results = []
    for module in (layer, compiled):
        out, routing = module(hidden)
        (grad,) = torch.autograd.grad(out.square().sum() + routing.aux_loss, hidden)
        results.append((out.detach(), *routing, grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def test_no_tokens() -> None:
    layer = MoELayer(D, F, E, K, shared_width=8, **LOSSES)
    out, routing = layer(torch.zeros(0, 3, D))
    assert out.shape == (0, 3, D)
    (out.sum() + routing.aux_loss).backward()
    assert not layer.experts.down_proj.grad.any()


def test_bad_options_are_refused_when_the_layer_is_made() -> None:
    with pytest.raises(ValueError, match=r"moe_route: top_k must be within 1 .. 6, got 7"):
        MoELayer(D, F, E, 7)
    with pytest.raises(ValueError, match="moe_route: score must be one of"):
        MoELayer(D, F, E, K, score="tanh")
    with pytest.raises(TypeError, match="temperature"):
        MoELayer(D, F, E, K, temperature=2.0)
    with pytest.raises(ValueError, match="moe_experts: activation must be one of"):
        MoELayer(D, F, E, K, activation="relu")(torch.zeros(2, D))
