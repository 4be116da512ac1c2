"""Patches of the student's stages, and self-attention over all stages and patches.

conv  X_bji = W_j vec(m F_j)[i p .. (i+1) p) + c_j + pos_i + st_j     pool  mean in place of vec
S = s Q K^T where the key is valid (and not of a later patch, if causal), else -inf
L = logsumexp S     A = exp(S - L)     Y = A V          no valid key: Y = 0, L = +inf
dV = A^T dY     dS = A (dY V^T - delta)     dQ = s dS K     dK = s dS^T Q     delta = rowsum(dY * Y)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shared import patches


def _rows(
    tokens_BLD: Tensor, offsets_BQ1: Tensor, mask_BL: Tensor | None, patch_size: int
) -> Tensor:
    """What the weight of a stage multiplies: [B, Q, p D] (conv) or [B, Q, D] (pool, p = 0)."""
    tokens = tokens_BLD.to(patches.wide_dtype(tokens_BLD.dtype))
    if patch_size == 0:
        return patches.pool_mean(tokens, offsets_BQ1, mask_BL)
    if mask_BL is not None:
        tokens = torch.where(mask_BL.ne(0)[:, :, None], tokens, 0)
    (B, L, D), Q = tokens.shape, offsets_BQ1.shape[1] - 1
    return F.pad(tokens, (0, 0, 0, Q * patch_size - L)).reshape(B, Q, patch_size * D)


def project_forward(
    stages: Sequence[Tensor],
    weight: Tensor,
    bias_SD: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    patch_embedding: Tensor | None,
    stage_embedding: Tensor | None,
    patch_size: int,
) -> Tensor:
    """X, stage-major [S, B, Q, D]."""
    wide = patches.wide_dtype(weight.dtype)
    shift = bias_SD.to(wide)[:, None, None, :]
    if stage_embedding is not None:
        shift = shift + stage_embedding.to(wide)[:, None, None, :]
    if patch_embedding is not None:
        shift = shift + patch_embedding.to(wide)
    rows = [_rows(stage, offsets_BQ1, mask_BL, patch_size) for stage in stages]
    parts = [row @ w.t() for row, w in zip(rows, weight.to(wide), strict=True)]
    return (torch.stack(parts) + shift).to(weight.dtype)


def project_backward(
    stages: Sequence[Tensor],
    weight: Tensor,
    dx_SBQD: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    patch_size: int,
    needs_stages: Sequence[bool],
    needs_weight: bool,
) -> tuple[list[Tensor], Tensor]:
    """dF of every stage and dW; what is not needed is an empty tensor."""
    wide = patches.wide_dtype(weight.dtype)
    dx = dx_SBQD.to(wide)
    dstages, dweights = [], []
    for j, stage in enumerate(stages):
        B, L, D = stage.shape
        if needs_weight:
            rows = _rows(stage, offsets_BQ1, mask_BL, patch_size)
            dweights.append(dx[j].flatten(0, 1).t() @ rows.flatten(0, 1))
        if not needs_stages[j]:
            dstages.append(stage.new_empty(0))
            continue
        drows = dx[j] @ weight[j].to(wide)
        if patch_size == 0:
            inside = patches.membership(offsets_BQ1, mask_BL, L).to(wide)
            share = inside / inside.sum(2, keepdim=True).clamp(min=1)
            dtokens = share.transpose(1, 2) @ drows
        else:
            dtokens = drows.reshape(B, drows.shape[1] * patch_size, D)[:, :L]
            if mask_BL is not None:
                dtokens = dtokens * mask_BL.ne(0)[:, :, None]
        dstages.append(dtokens.to(stage.dtype))
    dweight = torch.stack(dweights).to(weight.dtype) if needs_weight else weight.new_empty(0)
    return dstages, dweight


def _heads(rows_SBQD: Tensor, num_heads: int) -> Tensor:
    """[S, B, Q, D] to [B, H, P, D / H], P = S Q."""
    S, B, Q, D = rows_SBQD.shape
    return rows_SBQD.transpose(0, 1).reshape(B, S * Q, num_heads, D // num_heads).transpose(1, 2)


def _stage_major(heads_BHPE: Tensor, stages: int) -> Tensor:
    """The inverse of _heads."""
    B, H, P, E = heads_BHPE.shape
    return heads_BHPE.transpose(1, 2).reshape(B, stages, P // max(stages, 1), H * E).transpose(0, 1)


def _scores(
    q: Tensor, k: Tensor, valid_BQ: Tensor | None, stages: int, causal: bool, scale: float
) -> Tensor:
    scores_BHPP = scale * (q @ k.transpose(2, 3))
    Q = q.shape[2] // max(stages, 1)
    patch_P = torch.arange(Q, device=q.device).repeat(stages)
    seen = patch_P[None, :] <= patch_P[:, None] if causal else patch_P.new_ones(1, 1).bool()
    if valid_BQ is not None:
        seen = seen & valid_BQ.repeat(1, stages)[:, None, None, :]
    return torch.where(seen, scores_BHPP, -torch.inf)


def attention_forward(
    features_SBQD: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    valid_BQ: Tensor | None,
    num_heads: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y and QKV [S, B, Q, D and 3 D], and L [B, H, P] in float32 (float64 for float64)."""
    dtype, wide = features_SBQD.dtype, patches.wide_dtype(features_SBQD.dtype)
    bias = None if qkv_bias is None else qkv_bias.to(wide)
    qkv = F.linear(features_SBQD.to(wide), qkv_weight.to(wide), bias).to(dtype)
    q, k, v = (_heads(part.to(wide), num_heads) for part in qkv.chunk(3, dim=-1))
    scores = _scores(q, k, valid_BQ, qkv.shape[0], causal, scale)
    lse_BHP = torch.logsumexp(scores, dim=-1)
    lse_BHP = torch.where(lse_BHP == -torch.inf, torch.inf, lse_BHP)
    y = torch.exp(scores - lse_BHP[..., None]) @ v
    return _stage_major(y, qkv.shape[0]).to(dtype).contiguous(), qkv, lse_BHP


def attention_backward(
    qkv: Tensor,
    lse_BHP: Tensor,
    dy_SBQD: Tensor,
    delta_BHP: Tensor,
    valid_BQ: Tensor | None,
    num_heads: int,
    causal: bool,
    scale: float,
    upstream: Tensor,
) -> Tensor:
    """upstream times the gradient of QKV [S, B, Q, 3 D]."""
    wide, S = lse_BHP.dtype, qkv.shape[0]
    q, k, v = (_heads(part.to(wide), num_heads) for part in qkv.chunk(3, dim=-1))
    dy = _heads(dy_SBQD.to(wide), num_heads)
    weights = torch.exp(_scores(q, k, valid_BQ, S, causal, scale) - lse_BHP[..., None])
    dscores = weights * (dy @ v.transpose(2, 3) - delta_BHP[..., None])
    parts = (scale * dscores @ k, scale * dscores.transpose(2, 3) @ q, weights.transpose(2, 3) @ dy)
    dqkv = torch.cat([_stage_major(part, S) for part in parts], dim=-1)
    return (upstream * dqkv).to(qkv.dtype)
