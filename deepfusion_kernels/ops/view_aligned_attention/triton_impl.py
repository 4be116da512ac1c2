"""Triton backend of the stem: patch projection, attention whole on chip or by flash tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .triton_attention import attention_backward, attention_forward
from .triton_projection import MAX_STAGES, project_backward, project_forward

HEAD_SIZES = (16, 32, 64, 128)

__all__ = [
    "attention_backward",
    "attention_forward",
    "declines",
    "project_backward",
    "project_forward",
]


def declines(name: str, tensor: Tensor, **facts: Any) -> str | None:
    """Two- and four-byte floats, heads of a tensor core's sizes, stages that fit one launch."""
    head_size, stages = facts.get("head_size", 16), facts.get("stages", 1)
    if tensor.dtype == torch.float64:
        return "view-aligned attention serves float32, bfloat16 and float16, got float64"
    if head_size not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        return f"needs heads of {sizes} channels, got D / num_heads = {head_size}"
    if stages > MAX_STAGES:
        return f"projects at most {MAX_STAGES} stages in a launch, got {stages}"
    return None
