"""View-aligned attention from torch's own functions, in the dtype of its inputs, and its inputs."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Store = Callable[[str, Tensor], Tensor]


def nowhere(_: str, value: Tensor) -> Tensor:
    return value


def pooled(tokens: Tensor, offsets: Tensor, keep: Tensor) -> Tensor:
    """Mean of the kept tokens of every segment, by a loop over segments."""
    rows = []
    for b, cuts in enumerate(offsets.tolist()):
        cells = [
            tokens[b, start:end][keep[b, start:end]] for start, end in itertools.pairwise(cuts)
        ]
        rows.append([c.mean(0) if len(c) else tokens.new_zeros(tokens.shape[2]) for c in cells])
    return torch.stack([torch.stack(row) for row in rows])


def attention(
    features: Tensor,
    qkv_weight: Tensor,
    heads: int,
    causal: bool,
    valid: Tensor,
    store: Store = nowhere,
) -> Tensor:
    """F.scaled_dot_product_attention with an explicit [P, P] mask; features [B, S, Q, D]."""
    B, S, Q, D = features.shape
    qkv = store("qkv", F.linear(features.flatten(1, 2), qkv_weight))
    q, k, v = qkv.view(B, S * Q, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    patch = torch.arange(Q).repeat(S)
    seen = valid.repeat(1, S)[:, None, :].expand(B, S * Q, S * Q)
    if causal:
        seen = seen & (patch[None, :] <= patch[:, None])
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
    y = torch.where(seen.any(2)[:, None, :, None], y, 0)
    return y.transpose(1, 2).reshape(B, S, Q, D)


def feature_loss(
    student_stages: list[Tensor],
    teacher_stages: list[Tensor],
    patch_weight: Tensor,
    patch_bias: Tensor,
    qkv_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    num_heads: int,
    patch_size: int,
    patchify: str = "conv",
    causal: bool = False,
    attention_mask: Tensor | None = None,
    student_offsets: Tensor | None = None,
    teacher_offsets: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    patch_embedding: Tensor | None = None,
    stage_embedding: Tensor | None = None,
    target_norm: bool = False,
    store: Store = nowhere,
) -> Tensor:
    """`store` sees what a kernel keeps in memory in between, by name."""
    (B, T, H), p = student_stages[0].shape, patch_size
    keep = torch.ones(B, T, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    even = torch.arange(0, T + p, p).clamp(max=T).expand(B, -1)
    cuts = even if student_offsets is None else student_offsets
    goal_keep = keep if teacher_offsets is None else torch.ones(teacher_stages[0].shape[:2])
    goal_keep = (goal_keep if teacher_mask is None else teacher_mask).bool()
    goal_cuts = even if teacher_offsets is None else teacher_offsets
    ones = [pooled(k[:, :, None].double(), c, k) for k, c in ((keep, cuts), (goal_keep, goal_cuts))]
    valid = (ones[0] * ones[1])[:, :, 0] > 0
    rows = []
    for j, stage in enumerate(student_stages):
        clean = torch.where(keep[:, :, None], stage, 0)
        if patchify == "pool":
            means = store("means", pooled(clean, cuts, keep))
            row = F.linear(means, patch_weight[j], patch_bias[j])
        else:
            kernel = patch_weight[j].view(-1, p, H).permute(0, 2, 1)
            clean = F.pad(clean, (0, 0, 0, -T % p)).transpose(1, 2)
            row = F.conv1d(clean, kernel, patch_bias[j], stride=p).transpose(1, 2)
        row = row if patch_embedding is None else row + patch_embedding
        rows.append(row if stage_embedding is None else row + stage_embedding[j])
    x = store("x", torch.stack(rows, 1))
    y = store("y", attention(x, qkv_weight, num_heads, causal, valid, store))
    loss = torch.zeros((), dtype=torch.float64 if y.dtype == torch.float64 else torch.float32)
    for j, target in enumerate(teacher_stages):
        goal = pooled(torch.where(goal_keep[:, :, None], target, 0), goal_cuts, goal_keep)
        goal = F.layer_norm(goal, goal.shape[-1:], eps=1e-6) if target_norm else goal
        prediction = store("prediction", F.linear(y[:, j], head_weight[j], head_bias[j]))
        if valid.any():
            loss = loss + F.mse_loss(prediction[valid].to(loss.dtype), goal[valid].to(loss.dtype))
    return loss


def draw(
    dtype: torch.dtype, B: int = 2, T: int = 21, J: int = 3, H: int = 12, M: int = 10, D: int = 16,
    p: int = 4, heads: int = 2, patchify: str = "conv",
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the door; parameters scaled so that nothing saturates."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).to(dtype)

    width = H * (p if patchify == "conv" else 1)
    return {
        "student_stages": [normal(B, T, H, scale=0.5) for _ in range(J)],
        "teacher_stages": [normal(B, T, M) for _ in range(J)],
        "patch_weight": normal(J, D, width, scale=width**-0.5),
        "patch_bias": normal(J, D, scale=0.3),
        "qkv_weight": normal(3 * D, D, scale=D**-0.5),
        "head_weight": normal(J, M, D, scale=D**-0.5),
        "head_bias": normal(J, M),
        "num_heads": heads,
        "patch_size": p,
        "patchify": patchify,
    }
