"""From a name, a folder or a configuration to a transformers causal LM, and the way inside it.

Everything else in the driver asks here for layers, norms and heads, so that one file knows how the
architectures call them. Models are float32 masters; initial weights depend on the generator alone.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from .specs import SPECS

_LAYERS = ("layers", "h", "blocks")
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
_FFNS = ("mlp", "feed_forward", "ffn")
_POSITION_KEYS = ("max_position_embeddings", "n_positions")


def config_of(
    name_or_path: str, vocab_size: int, context_length: int = 0, eos_token_id: int = 0
) -> Any:
    """The transformers configuration of a name in `SPECS`, a config.json or a checkpoint's folder.

    The vocabulary is the tokenizer's; a checkpoint may pad it, never fall short of it. With
    `context_length` a named spec gets room for at least that many positions.
    Raises ValueError for an unknown name, a folder without config.json, or a small vocabulary.
    """
    if name_or_path in SPECS:
        keys = dict(SPECS[name_or_path])
        keys |= {"vocab_size": vocab_size, "bos_token_id": eos_token_id}
        config = transformers.AutoConfig.for_model(
            keys.pop("model_type"), **keys, eos_token_id=eos_token_id
        )
        if context_length:
            positions = next(key for key in _POSITION_KEYS if hasattr(config, key))
            tiny = config.hidden_size <= 256
            wanted = context_length if tiny else max(context_length, getattr(config, positions))
            setattr(config, positions, wanted)
        return config
    path = Path(name_or_path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        near = difflib.get_close_matches(name_or_path, SPECS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"build: model must be one of {sorted(SPECS)} or a path with config.json, "
            f"got {name_or_path!r}{hint}"
        )
    keys = json.loads(file.read_text())
    config = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"build: {file} must have vocab_size >= {vocab_size} as the tokenizer has, "
            f"got {config.vocab_size}"
        )
    return config


def build(
    name_or_path: str,
    vocab_size: int,
    generator: torch.Generator,
    context_length: int = 0,
    eos_token_id: int = 0,
) -> Any:
    """A causal LM: loaded where the folder holds weights, else initialised from the generator.

    >>> model = build("llama", 2048, torch.Generator().manual_seed(7), context_length=128)
    >>> head_weight(model).shape
    torch.Size([2048, 128])
    """
    config = config_of(name_or_path, vocab_size, context_length, eos_token_id)
    if any(Path(name_or_path).glob("*.safetensors")):
        return transformers.AutoModelForCausalLM.from_pretrained(
            name_or_path, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    return from_config(config, generator)


def from_config(config: Any, generator: torch.Generator | None = None) -> Any:
    """A float32 model of a configuration; without a generator its weights are those of seed 0."""
    seed = 0
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator))
    # transformers draws initial weights from the global generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def on_meta(config: Any) -> Any:
    """The model without memory: for counting and comparing before anything is built."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def count_parameters(config: Any) -> int:
    """Unique parameters of a configuration; tied ones count once."""
    return sum(parameter.numel() for parameter in on_meta(config).parameters())


def meta_state(config: Any) -> dict[str, Tensor]:
    """The state dict without memory: names, shapes, dtypes, and ties as shared tensors."""
    return cast(dict[str, Tensor], dict(on_meta(config).state_dict()))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict on the CPU; tied names share one tensor, as in the model."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        state[name] = copies[key]
    return state


def held_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict itself, not a copy: it changes as the model does; tied names share memory."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies a state into a model: every tensor must be there, a tied one under either name."""
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    given = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in state}
    everyone = dict(model.named_parameters(remove_duplicate=False))
    absent = [name for name in missing if id(everyone.get(name)) not in given]
    if absent or unexpected:
        raise ValueError(
            f"load_state: state must have the names of {type(model).__name__}, "
            f"missing {absent[:3]}, unknown {list(unexpected)[:3]}"
        )


def backbone(model: nn.Module) -> nn.Module:
    """The model without its head: gives `.last_hidden_state` [B, L, D], after the final norm."""
    return cast(nn.Module, model.base_model)


def head_weight(model: Any) -> Tensor:
    """The output layer's weight [V, D]."""
    return cast(Tensor, model.get_output_embeddings().weight)


def positions(model: Any) -> int:
    """The longest sequence that a model is made for; gpt2 has no embedding for one more."""
    return int(model.config.max_position_embeddings)


def layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers in order; a forward hook on one sees the residual stream after it."""
    return cast(nn.ModuleList, _named(backbone(model), _LAYERS, "decoder layers"))


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last layer and the head."""
    return _named(backbone(model), _FINAL_NORMS, "final norm")


def ffn(layer: nn.Module) -> nn.Module:
    """The feed-forward block of a layer: gate_proj, up_proj, down_proj, or a MoE block."""
    return _named(layer, _FFNS, "feed-forward block")


def is_moe(module: nn.Module) -> bool:
    """Whether a feed-forward block routes tokens to stacked experts."""
    return hasattr(module, "experts") and hasattr(module, "gate")


def _named(module: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    for name in names:
        if isinstance(getattr(module, name, None), nn.Module):
            return cast(nn.Module, getattr(module, name))
    raise ValueError(f"build: {type(module).__name__} must have its {what} under one of {names}")
