"""View-aligned attention: the student's stages, mixed, held to the teacher's.

X = patches of the J student stages, projected      Y = attention over all stages and patches
loss = sum_j s_j mean over valid patches and channels of |U_j Y_j + u_j - G_j|^2
G_j = mean of teacher stage j over the same patch
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import backends
from ..checks import expect_option, expect_that
from ..ops.fused_linear_mse.op import fused_linear_mse
from ..ops.shared import patches
from ..ops.shared.gradients import wants
from ..ops.view_aligned_attention.op import IMPLS, multi_stage_attention
from ..ops.view_aligned_attention.projection import project_patches
from .alignment_arguments import (
    autocast_door,
    check_embeddings,
    check_options,
    check_stage_weights,
    check_stages,
    check_weights,
    patch_tables,
    valid_patches,
)
from .alignment_node import joined_loss


@autocast_door
def view_aligned_attention(
    student_stages: Sequence[Tensor],
    teacher_stages: Sequence[Tensor],
    patch_weight: Tensor,
    patch_bias: Tensor,
    qkv_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    *,
    num_heads: int,
    patch_size: int = 8,
    patchify: str = "conv",
    causal: bool = False,
    attention_mask: Tensor | None = None,
    student_offsets: Tensor | None = None,
    teacher_offsets: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    patch_embedding: Tensor | None = None,
    stage_embedding: Tensor | None = None,
    target_norm: bool = False,
    stage_weights: Sequence[float] | None = None,
    return_features: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Feature loss of J student stages [B, T, H] against J teacher stages [B, T', M].

    patch_weight [J, D, p H] (conv) or [J, D, H] (pool), patch_bias [J, D], qkv_weight [3 D, D],
    head_weight [J, M, D], head_bias [J, M]; masks [B, T], [B, T'], 1 = valid; offsets [B, Q+1]
    int32 of both sides (pool only), else p tokens a patch; patch_embedding [Q, D], stage_embedding
    [J, D]. A patch counts where both sides hold a valid token. -> scalar, float32 (float64 for
    float64); with return_features also the J predictions [B, Q, M], differentiable. Under autocast
    all of them are lowered.
    Raises ValueError for what does not fit, NotImplementedError for a backend that cannot serve,
    RuntimeError for a second derivative. Source: arXiv 2602.14301, equations 7 to 9.
    """
    has_offsets = check_options(patchify, student_offsets, teacher_offsets)
    check_stages(student_stages, teacher_stages, has_offsets)
    student, teacher = student_stages[0], teacher_stages[0]
    offsets, target_offsets, target_mask = patch_tables(
        student, teacher, patch_size, attention_mask, student_offsets, teacher_offsets, teacher_mask
    )
    weights = (patch_weight, patch_bias, qkv_weight, head_weight, head_bias)
    p = patch_size if patchify == "conv" else 0
    check_weights(student, teacher, len(student_stages), p, weights, num_heads)
    check_embeddings(patch_embedding, stage_embedding, patch_bias, offsets.shape[1] - 1)
    scales = [1.0] * len(student_stages) if stage_weights is None else list(stage_weights)
    check_stage_weights(scales, len(student_stages))
    parameters = (*weights, patch_embedding, stage_embedding)
    inputs = (list(student_stages), list(teacher_stages), *parameters)
    tables = (offsets, target_offsets, attention_mask, target_mask)
    facts = {"head_size": patch_bias.shape[1] // num_heads, "stages": len(student_stages)}
    chosen = backends.choose(backend, student, IMPLS, **facts)
    options = (num_heads, p, causal, target_norm)
    if return_features:
        return _with_features(*inputs, *tables, scales, *options, chosen)
    hidden = (*inputs[0], patch_weight, patch_bias, qkv_weight, patch_embedding, stage_embedding)
    needs = (any(wants(*hidden)), *wants(head_weight, head_bias))
    return joined_loss(*inputs[:2], parameters, *tables, scales, *options, *needs, chosen)


def _with_features(
    stages: list[Tensor],
    targets: list[Tensor],
    patch_weight: Tensor,
    patch_bias: Tensor,
    qkv_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    patch_embedding: Tensor | None,
    stage_embedding: Tensor | None,
    offsets: Tensor,
    target_offsets: Tensor,
    mask: Tensor | None,
    target_mask: Tensor | None,
    stage_weights: list[float],
    num_heads: int,
    patch_size: int,
    causal: bool,
    target_norm: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    """The same loss from the separate ops, and the predictions in memory."""
    valid = valid_patches(
        offsets, target_offsets, mask, target_mask, stages[0].shape[1], targets[0].shape[1]
    )
    x = project_patches(
        stages, patch_weight, patch_bias, offsets, mask, patch_embedding, stage_embedding,
        patch_size, backend,
    )  # fmt: skip
    y = multi_stage_attention(
        x.transpose(0, 1), qkv_weight, num_heads=num_heads, causal=causal, patch_mask=valid,
        backend=backend,
    ).transpose(0, 1)  # fmt: skip
    features, losses = [], []
    rows = valid.to(patches.wide_dtype(x.dtype))
    for j, weight in enumerate(stage_weights):
        bias = None if head_bias is None else head_bias[j]
        features.append(F.linear(y[j], head_weight[j], bias))
        losses.append(
            weight
            * fused_linear_mse(
                y[j],
                head_weight[j],
                bias,
                targets[j],
                row_weight=rows,
                target_norm=target_norm,
                target_offsets=target_offsets,
                target_mask=target_mask,
                backend=backend,
            )
        )
    return torch.stack(losses).sum(), features


def sinusoid(count: int, width: int, like: Tensor) -> Tensor:
    """sin and cos of i / 10000^(2 c / D) for patch i, [count, width] in the dtype of `like`."""
    positions = torch.arange(count, device=like.device, dtype=torch.float32)[:, None]
    channels = torch.arange(width, device=like.device)
    rates = torch.exp(-math.log(10000.0) * (channels // 2 * 2).float() / width)
    angles = positions * rates
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos()).to(like.dtype)


class ViewAlignedAttention(nn.Module):
    """The feature loss with its parameters; used in training only, dropped with the teacher.

    student_dim H, teacher_dim M, num_stages J, dim D, p = patch_size tokens a patch. Parameters as
    in `view_aligned_attention`; with position='sinusoidal' a learned stage_embedding [J, D] (0 at
    first) and a fixed sinusoid over the patch index. Weights are uniform within 1 / sqrt(fan-in),
    drawn from `generator`; biases 0. Raises ValueError for unknown options and D % num_heads.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_stages: int = 4,
        dim: int = 512,
        num_heads: int = 8,
        patch_size: int = 8,
        patchify: str = "conv",
        causal: bool = False,
        position: str = "none",
        target_norm: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        expect_option(patchify, name, "patchify", ("conv", "pool"))
        expect_option(position, name, "position", ("none", "sinusoidal"))
        expect_that(num_stages >= 1, name, "num_stages", ">= 1", num_stages)
        expect_that(patch_size >= 1, name, "patch_size", ">= 1", patch_size)
        expect_that(dim % num_heads == 0, name, "num_heads", f"a divisor of {dim}", num_heads)
        self.num_heads, self.patch_size, self.patchify = num_heads, patch_size, patchify
        self.causal, self.position, self.target_norm = causal, position, target_norm
        width = student_dim * (patch_size if patchify == "conv" else 1)
        self.patch_weight = nn.Parameter(torch.empty(num_stages, dim, width))
        self.patch_bias = nn.Parameter(torch.zeros(num_stages, dim))
        self.qkv_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.head_weight = nn.Parameter(torch.empty(num_stages, teacher_dim, dim))
        self.head_bias = nn.Parameter(torch.zeros(num_stages, teacher_dim))
        if position == "sinusoidal":
            self.stage_embedding = nn.Parameter(torch.zeros(num_stages, dim))
        for weight in (self.patch_weight, self.qkv_weight, self.head_weight):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound, generator=generator)

    def forward(
        self,
        student_stages: Sequence[Tensor],
        teacher_stages: Sequence[Tensor],
        attention_mask: Tensor | None = None,
        *,
        student_offsets: Tensor | None = None,
        teacher_offsets: Tensor | None = None,
        teacher_mask: Tensor | None = None,
        return_features: bool = False,
        backend: str | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The loss; the teacher's stages are detached. Arguments as in `view_aligned_attention`."""
        patch_embedding = stage_embedding = None
        if self.position == "sinusoidal":
            stage_embedding = self.stage_embedding
            count = -(-student_stages[0].shape[1] // self.patch_size)
            if student_offsets is not None:
                count = student_offsets.shape[1] - 1
            patch_embedding = sinusoid(count, self.patch_bias.shape[1], self.patch_bias)
        return view_aligned_attention(
            student_stages, [stage.detach() for stage in teacher_stages], self.patch_weight,
            self.patch_bias, self.qkv_weight, self.head_weight, self.head_bias,
            num_heads=self.num_heads, patch_size=self.patch_size, patchify=self.patchify,
            causal=self.causal, attention_mask=attention_mask, student_offsets=student_offsets,
            teacher_offsets=teacher_offsets, teacher_mask=teacher_mask,
            patch_embedding=patch_embedding, stage_embedding=stage_embedding,
            target_norm=self.target_norm, return_features=return_features, backend=backend,
        )  # fmt: skip
