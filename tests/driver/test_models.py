"""Specs become models the same way every time; accessors find the same parts in every class."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepfusion.checkpoints import find_ties
from deepfusion.models import build, moe, sentences
from deepfusion.models.specs import SPECS
from tests.driver.tiny import KINDS, VOCAB, tiny

DEMO = ("gpt2", "llama", "qwen2", "qwen2-base", "deepseek-base")
PUBLISHED = ("gpt2-124m", "gpt2-medium", "tinyllama-1.1b", "qwen2-0.5b")


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", DEMO)
def test_same_generator_same_weights_and_the_global_one_is_left_alone(name: str) -> None:
    torch.manual_seed(1)
    first, second = (build.build(name, 300, seeded(), 32).state_dict() for _ in range(2))
    torch.manual_seed(1)
    untouched = torch.rand(3)
    torch.manual_seed(1)
    other = build.build(name, 300, seeded(8), 32).state_dict()
    assert torch.equal(torch.rand(3), untouched)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", DEMO)
def test_demo_models_are_tied_deep_enough_and_of_their_size(name: str) -> None:
    config = build.config_of(name, 2048, 128)
    low, high = (1.9e6, 2.6e6) if name.endswith("base") else (0.8e6, 1.1e6)
    assert low < build.count_parameters(config) < high
    assert config.num_hidden_layers == 4
    assert len(find_ties(build.meta_state(config))) == 1


# published sizes less the rows of their own vocabularies: 50,257, 50,257, 2 x 32,000, 151,936
@pytest.mark.parametrize(
    "name, vocab, millions",
    [
        ("gpt2-124m", 50257, 124.4),
        ("gpt2-medium", 50257, 354.8),
        ("tinyllama-1.1b", 32000, 1100.0),
        ("qwen2-0.5b", 151936, 494.0),
    ],
)
def test_published_shapes_have_their_published_size(name: str, vocab: int, millions: float) -> None:
    assert build.count_parameters(build.config_of(name, vocab)) / 1e6 == pytest.approx(
        millions, 1e-3
    )
    assert set(PUBLISHED) | set(DEMO) == set(SPECS)


@pytest.mark.parametrize("kind", KINDS)
def test_accessors_rebuild_the_logits(kind: str) -> None:
    model = tiny(kind)
    ids = torch.randint(VOCAB, (2, 9), generator=seeded())
    seen: list[torch.Tensor] = []
    handle = build.layers(model)[-1].register_forward_hook(
        lambda module, inputs, output: seen.append(output if torch.is_tensor(output) else output[0])
    )
    hidden = build.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    handle.remove()
    assert torch.equal(hidden @ build.head_weight(model).T, model(ids, use_cache=False).logits)
    assert torch.allclose(build.final_norm(model)(seen[0]), hidden)
    assert len(build.layers(model)) == model.config.num_hidden_layers
    assert not any(build.is_moe(build.ffn(layer)) for layer in build.layers(model))


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_out_and_in_again(kind: str) -> None:
    model, other = tiny(kind), tiny(kind, seed=5)
    state = build.state_of(model)
    assert set(state) == set(build.meta_state(model.config))
    assert find_ties(state) == find_ties(build.meta_state(model.config))
    with torch.no_grad():
        build.head_weight(model).add_(1)
    assert not torch.equal(state["lm_head.weight"], build.head_weight(model)), "a copy, no view"
    build.load_state(other, state)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_load_state_takes_a_tied_name_once_and_refuses_gaps() -> None:
    state = build.state_of(tiny("qwen2-tied"))
    for absent in ("lm_head.weight", "model.embed_tokens.weight"):
        once = {name: tensor for name, tensor in state.items() if name != absent}
        other = tiny("qwen2-tied", seed=5)
        build.load_state(other, once)
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    del state["model.norm.weight"]
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\], unknown \[\]"):
        build.load_state(tiny("qwen2-tied"), state)
    with pytest.raises(ValueError, match=r"missing .* unknown \['h.0'\]"):
        build.load_state(tiny("qwen2-tied"), {"h.0": torch.zeros(1)})


def test_paths_are_built_and_checkpoints_loaded(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(str(tmp_path))
    loaded = build.build(str(tmp_path), VOCAB, seeded())
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    fresh = build.build(str(tmp_path / "config.json"), VOCAB, seeded())
    assert fresh.config.num_hidden_layers == 3
    assert not torch.equal(build.head_weight(fresh), build.head_weight(model))
    with pytest.raises(ValueError, match=r"vocab_size >= 900 as the tokenizer has, got 61"):
        build.build(str(tmp_path), 900, seeded())


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'lama'; did you mean 'llama'"):
        build.config_of("lama", 300)
    with pytest.raises(ValueError, match=r"or a path with config\.json"):
        build.config_of(str(tmp_path), 300)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-kind"}))
    with pytest.raises(ValueError, match="no-such-kind"):
        build.config_of(str(tmp_path), 300)


def moe_of(kind: str, target: str, **options: Any) -> Any:
    merge = {"target": target, "num_domains": 4, "top_k": 2, **options}
    return moe.new_moe(tiny(kind).config, **merge)


@pytest.mark.parametrize(
    "kind, target", [("qwen2", "qwen2_moe"), ("llama", "qwen2_moe"), ("deepseek_v3", "deepseek_v3")]
)
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("shared", ["none", "mean"])
def test_new_moe_has_the_bases_attention_and_split_experts(
    kind: str, target: str, segments: int, shared: str
) -> None:
    base, model = tiny(kind), moe_of(kind, target, segments=segments, shared=shared)
    width = base.config.intermediate_size
    state = build.state_of(model)
    for name, tensor in build.state_of(base).items():
        if ".mlp." not in name:
            assert state[name].shape == tensor.shape
            assert state[name].isnan().all(), "the merge must write it"
    for layer in build.layers(model):
        block: Any = build.ffn(layer)
        assert build.is_moe(block)
        assert block.experts.down_proj.shape == (
            4 * segments,
            base.config.hidden_size,
            width // segments,
        )
        assert not block.gate.weight.any()
        gate, expert = moe.shared_expert(block)
        zero = all(not p.any() and not p.requires_grad for p in expert.parameters())
        assert zero == (shared == "none")
        assert gate is None or not gate.weight.any()
        if shared == "mean":
            assert expert.down_proj.weight.shape[1] == width
    assert model.config.num_experts_per_tok == 2 * segments


def test_moe_refusals() -> None:
    with pytest.raises(ValueError, match="FFN width must be a multiple of segments = 5, got 48"):
        moe_of("qwen2", "qwen2_moe", segments=5)
    with pytest.raises(ValueError, match=r"top_k must be in 1..4 domains, got 5"):
        moe_of("qwen2", "qwen2_moe", top_k=5)
    with pytest.raises(ValueError, match=r"base of target 'deepseek_v3' must be .* got 'qwen2'"):
        moe_of("qwen2", "deepseek_v3")
    with pytest.raises(ValueError, match=r"target must be one of .* got 'mixtral'"):
        moe_of("qwen2", "mixtral")
    with pytest.raises(ValueError, match="must have 2 experts or more, got 1"):
        moe_of("deepseek_v3", "deepseek_v3", num_domains=1, top_k=1)
    config = tiny("deepseek_v3").config
    config.first_k_dense_replace = 1
    with pytest.raises(ValueError, match="dense in all 2 layers, got first_k_dense_replace = 1"):
        moe.moe_config(config, target="deepseek_v3", num_domains=4, top_k=2)


def test_sentence_encoder_ignores_padding(tmp_path: Path) -> None:
    from deepfusion.data.corpora import train_tokenizer

    texts = ["a clinic", "a clinic in a town by the river", "the market"]
    train_tokenizer(texts * 20, 300).save_pretrained(str(tmp_path))
    model = build.from_config(build.config_of("llama", 300, 64), seeded())
    model.save_pretrained(str(tmp_path))
    together = sentences.mean_states(str(tmp_path), texts)
    alone = torch.cat([sentences.mean_states(str(tmp_path), [text]) for text in texts])
    assert together.shape == (3, 128)
    assert torch.allclose(together, alone, atol=1e-5)
