"""A sentence encoder from a local folder: the mean of its last states over a text's tokens."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

_TEXTS_AT_ONCE = 32  # bounds the memory of a batch; unmeasured


@cache
def _loaded(path: str) -> tuple[Any, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(
        path, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model.eval()


@torch.no_grad()
def mean_states(path: str, texts: Sequence[str]) -> Tensor:
    """[N, D] float32; texts are cut to the encoder's context length."""
    tokenizer, model = _loaded(path)
    means = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        batch = tokenizer(
            list(texts[start : start + _TEXTS_AT_ONCE]),
            padding=True,
            truncation=True,
            max_length=min(tokenizer.model_max_length, 512),
            return_tensors="pt",
        )
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        means.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(means)
