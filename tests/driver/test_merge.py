"""Merging: the identities of a mixture made of equal and of unequal bases."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion.config_tables import MergeConfig
from deepfusion.models import build, experts
from deepfusion.server.merge import merge, shared_scale
from deepfusion.server.router import RouterTap
from deepfusion.server.router_init import RouterText

from .tiny import LENGTH, VOCAB, logits, text, tiny

TARGETS = {
    "qwen2": "qwen2_moe",
    "qwen2-tied": "qwen2_moe",
    "llama": "qwen2_moe",
    "deepseek_v3": "deepseek_v3",
}
NORMAL = MergeConfig(router_init="normal")


def merged(models: list[Any], config: MergeConfig, seed: int = 3, noise: float = 0.5) -> Any:
    """The merge, with rows of the routers drawn large enough to decide; equal inside domains."""
    states = [build.state_of(model) for model in models]
    moe = merge(states, models[0].config, config, seed)
    for router in experts.routers(moe):
        weight = router.get_parameter("weight")
        rows = noise * torch.randn(len(models), weight.shape[1])
        weight.data.copy_(rows.repeat_interleave(config.segments, dim=0))
    return moe


def ids() -> Tensor:
    return torch.randint(VOCAB, (3, LENGTH))


def assert_same_function(moe: Any, dense: Any) -> None:
    batch = ids()
    truth = logits(dense, batch)
    largest = (logits(moe, batch) - truth).abs().max()
    assert largest <= 1e-5 * max(1.0, float(truth.detach().abs().max()))
    assert truth.abs().max() > 1.0, "a model of small logits proves nothing"


@pytest.mark.parametrize("kind", list(TARGETS))
@pytest.mark.parametrize("segments", [1, 2, 4])
@pytest.mark.parametrize("scale", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_equal_bases_give_the_dense_function(
    kind: str, segments: int, scale: float, top_k: int
) -> None:
    base = tiny(kind)
    config = replace(
        NORMAL,
        target=TARGETS[kind],
        segments=segments,
        top_k=top_k,
        shared="mean" if scale else "none",
        shared_scale=scale or 0.25,
    )
    assert_same_function(merged([base] * 3, config), base)


def test_without_the_factor_the_identity_breaks() -> None:
    base = tiny("qwen2")
    moe = merged([base] * 3, replace(NORMAL, segments=2))
    for block in experts.moe_blocks(moe):
        block.down.data.div_(2)
    with pytest.raises(AssertionError):
        assert_same_function(moe, base)


@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
@pytest.mark.parametrize("segments", [2, 4])
def test_split_experts_equal_full_width_ones(kind: str, segments: int) -> None:
    models = [tiny(kind, seed) for seed in range(3)]
    config = replace(NORMAL, target=TARGETS[kind])
    torch.manual_seed(5)
    whole = merged(models, config)
    torch.manual_seed(5)
    split = merged(models, replace(config, segments=segments))
    assert_same_function(split, whole)


@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
def test_uniform_router_over_all_gives_the_mean_of_the_ffns(kind: str) -> None:
    models = [tiny(kind, seed) for seed in range(3)]
    moe = merged(models, replace(NORMAL, target=TARGETS[kind], top_k=3), noise=0.0)
    hidden = torch.randn(2, 5, 32)
    for layer in range(2):
        ffns = [build.ffn(build.layers(model)[layer]) for model in models]
        truth = torch.stack([ffn(hidden) for ffn in ffns]).mean(0)
        ours = build.ffn(build.layers(moe)[layer])(hidden)
        assert (ours - truth).abs().max() <= 1e-5 * max(1.0, float(truth.detach().abs().max()))


@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
@pytest.mark.parametrize("segments,shared", [(1, "none"), (2, "none"), (2, "mean")])
def test_experts_are_the_ffns_bit_for_bit(kind: str, segments: int, shared: str) -> None:
    models = [tiny(kind, seed) for seed in range(3)]
    config = replace(NORMAL, target=TARGETS[kind], segments=segments, shared=shared)
    moe = merged(models, config)
    factor = 1.0 if kind == "deepseek_v3" else segments * (1 - shared_scale(config))
    for layer, block in enumerate(experts.moe_blocks(moe)):
        for i, model in enumerate(models):
            ffn: Any = build.ffn(build.layers(model)[layer])
            own = slice(i * segments, (i + 1) * segments)
            gate, up = block.gate_up[own].chunk(2, dim=1)
            assert torch.equal(gate.flatten(0, 1), ffn.gate_proj.weight)
            assert torch.equal(up.flatten(0, 1), ffn.up_proj.weight)
            down = torch.cat(list(block.down[own]), dim=1)
            assert torch.equal(down, ffn.down_proj.weight * factor)


def test_everything_else_is_the_mean_and_ties_hold() -> None:
    models = [tiny("qwen2-tied", seed) for seed in range(3)]
    moe = merged(models, NORMAL)
    assert build.head_weight(moe) is moe.get_input_embeddings().weight
    states = [model.state_dict() for model in models]
    for name, tensor in moe.state_dict().items():
        if name in states[0]:
            truth = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(tensor.double(), truth, rtol=0, atol=1e-6)
    assert all(parameter.isfinite().all() for parameter in moe.parameters())


def test_an_idle_shared_expert_is_zero() -> None:
    for kind in ("qwen2", "deepseek_v3"):
        moe = merged([tiny(kind)] * 2, replace(NORMAL, target=TARGETS[kind]))
        assert all(
            not p.any() for block in experts.moe_blocks(moe) for p in block.shared.parameters()
        )


def test_softmax_over_all_is_the_dense_function_only_for_all_experts() -> None:
    base = tiny("qwen2")
    config = replace(NORMAL, renormalize=False)
    assert_same_function(merged([base] * 3, replace(config, top_k=3)), base)
    with pytest.raises(AssertionError):
        assert_same_function(merged([base] * 3, replace(config, top_k=2)), base)


def test_rows_of_a_domain_start_equal_and_depend_on_the_seed() -> None:
    states = [build.state_of(tiny("qwen2"))] * 3
    config = replace(NORMAL, segments=2)
    first, again, other = (merge(states, tiny("qwen2").config, config, seed) for seed in (1, 1, 2))
    for one, two, three in zip(*map(experts.routers, (first, again, other)), strict=True):
        rows = one.get_parameter("weight").detach().unflatten(0, (3, 2))
        assert torch.equal(rows[:, 0], rows[:, 1])
        assert not torch.equal(rows[0], rows[1])
        assert torch.equal(one.get_parameter("weight"), two.get_parameter("weight"))
        assert not torch.equal(one.get_parameter("weight"), three.get_parameter("weight"))
        assert rows.std() == pytest.approx(0.02, rel=0.5)


@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
def test_centroid_routers_know_their_domains(kind: str) -> None:
    packed = text(30)
    affinity = torch.nn.functional.one_hot(packed.domain, 3).float()
    base = tiny(kind)
    # words of a domain resemble each other, as they do in a trained model
    meaning = torch.randn(3, 32).repeat_interleave(VOCAB // 3, dim=0)
    base.get_input_embeddings().weight.data[: len(meaning)] += meaning
    config = MergeConfig(router_init="centroids", target=TARGETS[kind], top_k=1)
    reading = RouterText(packed.ids, affinity)
    moe = merge([build.state_of(base)] * 3, base.config, config, 1, reading)
    with RouterTap(moe, inputs=True) as tap:
        logits(moe, packed.ids)
        domain = packed.domain.repeat_interleave(LENGTH)
        hits = [(chosen[:, 0] == domain).float().mean() for chosen in tap.experts]
        assert min(hits) > 0.7, hits
        # the first layer's inputs do not depend on the routing: its logits are what gamma made them
        spread = tap.logits[0].std(dim=0, correction=0).square().mean().sqrt()
        assert spread == pytest.approx(1.0, rel=0.02)
        overall = torch.stack([tap.inputs[0][domain == i].mean(0) for i in range(3)]).mean(0)
        common = experts.routers(moe)[0].get_parameter("weight") @ overall
        assert common.abs().max() < 1e-3
    assert all(router.top_k == 1 for router in experts.routers(moe))


def test_domains_that_read_the_same_text_route_evenly() -> None:
    packed = text(8, domains=1)
    same = RouterText(packed.ids.repeat(2, 1), torch.eye(2).repeat_interleave(8, dim=0))
    base = tiny("qwen2")
    moe = merge(
        [build.state_of(base)] * 2, base.config, MergeConfig(router_init="centroids"), 1, same
    )
    assert all(not router.get_parameter("weight").any() for router in experts.routers(moe))


def test_merging_refuses_what_does_not_fit() -> None:
    base = tiny("qwen2")
    state = build.state_of(base)
    with pytest.raises(ValueError, match="at least one state"):
        merge([], base.config, NORMAL, 0)
    with pytest.raises(
        ValueError, match="base 1 must hold the tensors of base 0; they differ in 'extra'"
    ):
        merge([state, {**state, "extra": torch.ones(1)}], base.config, NORMAL, 0)
    with pytest.raises(ValueError, match="tensor 'extra' of the bases has no place"):
        merge([{**state, "extra": torch.ones(1)}] * 2, base.config, NORMAL, 0)
    with pytest.raises(ValueError, match="multiple of segments = 5"):
        merge([state] * 2, base.config, replace(NORMAL, segments=5), 0)
    with pytest.raises(ValueError, match="deepseek_v3"):
        merge([state] * 2, base.config, replace(NORMAL, target="deepseek_v3"), 0)
    with pytest.raises(ValueError, match="needs public text"):
        merge([state] * 2, base.config, MergeConfig(router_init="centroids"), 0)
