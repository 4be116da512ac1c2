"""The configuration of the MoE that a dense base becomes, and the empty model of it.

K domains of full width F, cut into m segments: E = K m experts of width F / m, k m per token.

    Qwen2-MoE     base: dense Qwen2, or Llama (no bias on q, k, v)
    DeepSeek-V3   base: the class itself, all layers dense (multi-head latent attention)

Both classes insist on a shared expert. Where none is wanted it is as narrow as can be and zero.
"""

import math
from typing import Any

import torch
import transformers
from torch import nn

from . import build

# narrower saves nothing: a zero expert costs its launch
_ZERO_SHARED_WIDTH = 8
_SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "intermediate_size",
)
_DEEPSEEK_KEYS = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "rope_interleave",
    "attention_bias",
)


def moe_config(
    base: Any,
    *,
    target: str,
    num_domains: int,
    top_k: int,
    segments: int = 1,
    shared: str = "none",
    shared_scale: float = 0.25,
    renormalize: bool = True,
) -> Any:
    """The target's configuration for a dense base: what method.md, section 6 asks of each class.

    Raises ValueError for a base whose attention the target lacks, F % m != 0, k > K.
    """
    width, experts = base.intermediate_size, num_domains * segments
    if width % segments:
        raise ValueError(
            f"new_moe: FFN width must be a multiple of segments = {segments}, got {width}"
        )
    if not 1 <= top_k <= num_domains:
        raise ValueError(f"new_moe: top_k must be in 1..{num_domains} domains, got {top_k}")
    fitting = {"qwen2_moe": ("qwen2", "llama"), "deepseek_v3": ("deepseek_v3",)}
    if target not in fitting:
        raise ValueError(f"new_moe: target must be one of {sorted(fitting)}, got {target!r}")
    if base.model_type not in fitting[target]:
        raise ValueError(
            f"new_moe: base of target {target!r} must be one of {fitting[target]}, "
            f"got {base.model_type!r}"
        )
    keys = {key: getattr(base, key) for key in _SHARED_KEYS}
    keys |= {
        "moe_intermediate_size": width // segments,
        "num_experts_per_tok": top_k * segments,
        "norm_topk_prob": renormalize,
    }
    if target == "qwen2_moe":
        keys |= _qwen2_moe_keys(base, experts, width if shared == "mean" else _ZERO_SHARED_WIDTH)
    else:
        keys |= _deepseek_keys(base, experts, segments)
        keys["routed_scaling_factor"] = segments * (1 - shared_scale if shared == "mean" else 1.0)
    return transformers.AutoConfig.for_model(target, **keys)


def new_moe(base: Any, **options: Any) -> Any:
    """The empty MoE of a dense base's configuration; options are those of `moe_config`.

    Router rows, the shared expert's gate and an unwanted shared expert are zero, the latter frozen.
    All other weights are NaN until the merge writes them: a forgotten tensor cannot pass unseen.
    """
    model = build.from_config(moe_config(base, **options))
    wants_shared = options.get("shared", "none") == "mean"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
        for layer in build.layers(model):
            block: Any = build.ffn(layer)
            block.gate.weight.zero_()
            gate, expert = shared_expert(block)
            if gate is not None:
                gate.weight.zero_()
            for parameter in () if wants_shared else (*expert.parameters(),):
                parameter.zero_().requires_grad_(False)
            if gate is not None and not wants_shared:
                gate.weight.requires_grad_(False)
    return model


def shared_expert(block: Any) -> tuple[nn.Linear | None, nn.Module]:
    """The shared expert of a MoE block with its sigmoid gate; DeepSeek's has no gate."""
    if hasattr(block, "shared_expert"):
        return block.shared_expert_gate, block.shared_expert
    return None, block.shared_experts


def _qwen2_moe_keys(base: Any, experts: int, shared_width: int) -> dict[str, Any]:
    heads_width = base.hidden_size // base.num_attention_heads
    if (getattr(base, "head_dim", None) or heads_width) != heads_width:
        raise ValueError(
            f"new_moe: head width must be D / heads = {heads_width}, got {base.head_dim}"
        )
    return {
        "num_experts": experts,
        "shared_expert_intermediate_size": shared_width,
        "qkv_bias": base.model_type == "qwen2",
    }


def _deepseek_keys(base: Any, experts: int, segments: int) -> dict[str, Any]:
    if base.first_k_dense_replace < base.num_hidden_layers:
        raise ValueError(
            f"new_moe: base must be dense in all {base.num_hidden_layers} layers, "
            f"got first_k_dense_replace = {base.first_k_dense_replace}"
        )
    if experts < 2:
        raise ValueError("new_moe: DeepSeek-V3 must have 2 experts or more, got 1")
    return {key: getattr(base, key) for key in _DEEPSEEK_KEYS} | {
        "n_routed_experts": experts,
        "n_shared_experts": segments,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
    }
