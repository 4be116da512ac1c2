"""Tiny models and texts of the driver's tests: two layers, a vocabulary of 61."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from deepfusion.data.batches import Packed
from deepfusion.metrics import Recorder
from deepfusion.models import build

VOCAB = 61
LENGTH = 12

QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": QWEN2,
    "qwen2-tied": {**QWEN2, "tie_word_embeddings": True},
    "llama": {**QWEN2, "model_type": "llama", "hidden_size": 24, "num_hidden_layers": 3},
    "gpt2": {"model_type": "gpt2", "n_embd": 20, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "deepseek_v3": {
        **QWEN2,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 2,
        "num_nextn_predict_layers": 0,
    },
}


def tiny(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model of `KINDS` whose logits are far from uniform."""
    keys = {**KINDS[kind], **changes}
    config = transformers.AutoConfig.for_model(
        keys.pop("model_type"), **keys, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0
    )
    model = build.from_config(config, torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            # the usual 0.02 would leave every identity true to 1e-5 by smallness alone
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=draw))
    return model


def text(num_sequences: int = 12, domains: int = 3, seed: int = 0) -> Packed:
    """Sequences of `domains` domains in turn, each with its own third of the vocabulary."""
    draw = torch.Generator().manual_seed(seed)
    domain = torch.arange(num_sequences) % domains
    span = VOCAB // domains
    ids = torch.randint(span, (num_sequences, LENGTH), generator=draw) + domain[:, None] * span
    names = tuple(f"domain-{i}" for i in range(domains))
    return Packed(ids, torch.arange(num_sequences), domain, names)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit, naming what differs."""
    assert one.keys() == other.keys()
    unequal = [name for name in one if not torch.equal(one[name], other[name])]
    assert not unequal, unequal


class Killed(Exception):
    """Stands for kill -9 in the middle of a stage."""


@contextmanager
def killing(recorder: Recorder, stage: str, step: int) -> Iterator[None]:
    """Ends the stage when it wants to record that step."""

    def record(name: str, at: int, **values: float) -> None:
        if name == stage and at == step:
            raise Killed
        Recorder.record(recorder, name, at, **values)

    recorder.record = record  # type: ignore[method-assign]
    try:
        yield
    finally:
        del recorder.record
