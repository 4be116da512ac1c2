"""Tiny models of transformers, one a family, with weights that let their experts be seen."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
transformers = pytest.importorskip("transformers", minversion="5.7")

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {
    "num_experts": 8,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 4,
    "topk_group": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**QWEN, "norm_topk_prob": True, "head_dim": 8},
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8, "norm_topk_prob": False},
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    "deepseek_v3": {**LATENT, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
}
GPT_OSS = {"num_local_experts": 8, "head_dim": 8}


def build(name: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(name, **{**COMMON, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            # tiny initial weights would hide the experts behind the residual stream
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model.to(dtype).eval()


def tokens() -> Tensor:
    return torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(5))
