"""Architectures by name: what a transformers configuration needs beyond the vocabulary.

The first five are the demo's. Their sizes come from two CPU cores: with batches of 8 x 128 tokens a
device's step takes 70-95 ms and a step of the base 130-165 ms (docs/data.md). Four layers each,
because the feature loss compares four stages; tied embeddings, because at this size the vocabulary
is a third of the model. The others are published shapes, for users with a GPU.
"""

from collections.abc import Mapping
from typing import Any

_SMALL: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}

SPECS: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 128,
        "n_inner": 384,
        "n_layer": 4,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
    },
    "llama": {"model_type": "llama", **_SMALL},
    "qwen2": {"model_type": "qwen2", **_SMALL, "num_key_value_heads": 4},
    "qwen2-base": {
        "model_type": "qwen2",
        **_SMALL,
        "hidden_size": 192,
        "intermediate_size": 512,
    },
    # multi-head latent attention: no other base fits a DeepSeek-V3 target
    "deepseek-base": {
        "model_type": "deepseek_v3",
        **_SMALL,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_key_value_heads": 4,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 48,
        "first_k_dense_replace": 4,
        "num_nextn_predict_layers": 0,
    },
    "gpt2-124m": {"model_type": "gpt2"},
    "gpt2-medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "tinyllama-1.1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
    },
    "qwen2-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
