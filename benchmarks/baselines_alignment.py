"""Plain torch beside the view-aligned attention and its parts; see baselines.py for the names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _patch_means(tokens: Tensor, patch_size: int, mask: Tensor | None) -> Tensor:
    """Mean of the kept tokens of every patch [B, Q, D], the tail padded."""
    B, L, D = tokens.shape
    tail = -L % patch_size
    cells = F.pad(tokens, (0, 0, 0, tail)).view(B, -1, patch_size, D)
    keep = tokens.new_ones(B, L) if mask is None else mask.to(tokens.dtype)
    keep = F.pad(keep, (0, tail)).view(B, -1, patch_size, 1)
    return (cells * keep).sum(2) / keep.sum(2).clamp(min=1)


def _patch_valid(mask: Tensor, patch_size: int) -> Tensor:
    """[B, Q]: a token of the patch counts."""
    return F.pad(mask, (0, -mask.shape[1] % patch_size)).view(len(mask), -1, patch_size).any(2)


def eager_fused_linear_mse(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    patch_size: int,
    target_norm: bool = False,
    target_mask: Tensor | None = None,
) -> Tensor:
    """Pool, F.linear, F.mse_loss in float32; where tokens are masked, its mean over valid rows."""
    goal = _patch_means(target, patch_size, target_mask)
    goal = F.layer_norm(goal, goal.shape[-1:], eps=1e-6) if target_norm else goal
    prediction = F.linear(features, weight, bias).float()
    if target_mask is None:
        return F.mse_loss(prediction, goal.float())
    valid = _patch_valid(target_mask, patch_size)[:, :, None]
    errors = F.mse_loss(prediction, goal.float(), reduction="none") * valid
    return errors.sum() / (goal.shape[-1] * valid.sum())


def eager_multi_stage_attention(
    features: Tensor,
    qkv_weight: Tensor,
    *,
    num_heads: int,
    causal: bool = False,
    patch_mask: Tensor | None = None,
) -> Tensor:
    """F.scaled_dot_product_attention with a boolean mask."""
    B, S, Q, D = features.shape
    qkv = F.linear(features.flatten(1, 2), qkv_weight).view(B, S * Q, 3, num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    seen = None
    if patch_mask is not None:
        seen = patch_mask.repeat(1, S)[:, None, None, :]
    if causal:
        patch = torch.arange(Q, device=features.device).repeat(S)
        earlier = patch[None, :] <= patch[:, None]
        seen = earlier[None, None] if seen is None else seen & earlier
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return y.transpose(1, 2).reshape(B, S, Q, D)


@functools.cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex_multi_stage_attention(
    features: Tensor,
    qkv_weight: Tensor,
    *,
    num_heads: int,
    causal: bool = False,
    patch_mask: Tensor | None = None,
) -> Tensor:
    """FlexAttention, compiled, with the mask by patch; it has no backward on the CPU."""
    from torch.nn.attention.flex_attention import create_block_mask

    B, S, Q, D = features.shape
    if features.device.type == "cpu" and features.requires_grad:
        raise NotImplementedError("flex: FlexAttention has no backward on the CPU")
    qkv = F.linear(features.flatten(1, 2), qkv_weight).view(B, S * Q, 3, num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)

    def seen(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        keep = key >= 0 if patch_mask is None else patch_mask[b, key % Q]
        return keep & (key % Q <= query % Q) if causal else keep

    mask = create_block_mask(seen, B, None, S * Q, S * Q, device=features.device)
    y = _flex()(q, k, v, block_mask=mask)
    return y.transpose(1, 2).reshape(B, S, Q, D)


def eager_view_aligned_attention(
    student_stages: list[Tensor],
    teacher_stages: list[Tensor],
    patch_weight: Tensor,
    patch_bias: Tensor,
    qkv_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    num_heads: int,
    patch_size: int = 8,
    patchify: str = "conv",
    causal: bool = False,
    attention_mask: Tensor | None = None,
    target_norm: bool = False,
    as_conv1d: bool = False,
) -> Tensor:
    """F.linear on views (or F.conv1d), stack, SDPA, F.linear, F.mse_loss."""
    (B, T, H), p, mask = student_stages[0].shape, patch_size, attention_mask
    parts = []
    for stage, weight, bias in zip(student_stages, patch_weight, patch_bias, strict=True):
        if mask is not None and patchify == "conv":
            stage = torch.where(mask[:, :, None], stage, 0)
        if patchify == "pool" and as_conv1d:
            rows = F.avg_pool1d(stage.transpose(1, 2), p, ceil_mode=True)
            parts.append(F.conv1d(rows, weight[:, :, None], bias).transpose(1, 2))
        elif patchify == "pool":
            parts.append(F.linear(_patch_means(stage, p, mask), weight, bias))
        elif as_conv1d:
            kernel = weight.view(-1, p, H).permute(0, 2, 1)
            rows = F.pad(stage, (0, 0, 0, -T % p)).transpose(1, 2)
            parts.append(F.conv1d(rows, kernel, bias, stride=p).transpose(1, 2))
        else:
            rows = F.pad(stage, (0, 0, 0, -T % p)) if T % p else stage
            parts.append(F.linear(rows.reshape(B, -1, p * H), weight, bias))
    y = eager_multi_stage_attention(
        torch.stack(parts, 1), qkv_weight, num_heads=num_heads, causal=causal,
        patch_mask=None if mask is None else _patch_valid(mask, p),
    )  # fmt: skip
    losses = [
        eager_fused_linear_mse(
            y[:, j], head_weight[j], head_bias[j], target, patch_size=p, target_norm=target_norm,
            target_mask=mask,
        )
        for j, target in enumerate(teacher_stages)
    ]  # fmt: skip
    return torch.stack(losses).sum()


def conv1d_view_aligned_attention(*arguments: Any, **options: Any) -> Tensor:
    """The same with the patches projected by Conv1d, as the paper's figure draws it."""
    if options.get("patchify") == "pool" and options.get("attention_mask") is not None:
        raise NotImplementedError("conv1d: F.avg_pool1d counts every token; see eager")
    return eager_view_aligned_attention(*arguments, **options, as_conv1d=True)
