"""The student's stages cut to patches and projected to one width: internal, stage-major.

conv (p > 0)  X_jbi = W_j vec(m F_jb)[i p .. (i+1) p) + c_j + pos_i + st_j
pool (p = 0)  X_jbi = W_j mean of the valid tokens of patch i + c_j + pos_i + st_j
dW_j = sum dX^T rows      dF = dX W_j at its slot (pool: times m / n)      dc = dst = sum_bi dX
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shared import patches
from ..shared.gradients import where_wanted
from .op import IMPLS


def shift_gradients(dx_SBQD: Tensor, needs_bias: bool, needs_patch: bool) -> tuple[Tensor, Tensor]:
    """dc = dst [S, D] and dpos [Q, D]; what is not needed is an empty tensor."""
    dtype, wide = dx_SBQD.dtype, patches.wide_dtype(dx_SBQD.dtype)
    nothing = dx_SBQD.new_empty(0)
    dbias = dx_SBQD.sum((1, 2), dtype=wide).to(dtype) if needs_bias else nothing
    dpatch = dx_SBQD.sum((0, 1), dtype=wide).to(dtype) if needs_patch else nothing.clone()
    return dbias, dpatch


@torch.library.custom_op("deepfusion::patch_projection", mutates_args=())
def project_patches(
    stages: list[Tensor],
    weight: Tensor,
    bias_SD: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    patch_embedding: Tensor | None,
    stage_embedding: Tensor | None,
    patch_size: int,
    backend: str,
) -> Tensor:
    """X [S, B, Q, D] of S stages [B, L, H]."""
    offsets = patches.checked_offsets(
        offsets_BQ1, stages[0].shape[1], "view_aligned_attention", "student_offsets"
    )
    x_SBQD: Tensor = IMPLS[backend].project_forward(
        stages, weight, bias_SD, offsets, mask_BL, patch_embedding, stage_embedding, patch_size
    )
    return x_SBQD


@project_patches.register_fake
def _(
    stages: list[Tensor],
    weight: Tensor,
    bias_SD: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    patch_embedding: Tensor | None,
    stage_embedding: Tensor | None,
    patch_size: int,
    backend: str,
) -> Tensor:
    (B, cuts), (S, D) = offsets_BQ1.shape, bias_SD.shape
    return weight.new_empty(S, B, cuts - 1, D)


@torch.library.custom_op("deepfusion::patch_projection_backward", mutates_args=())
def _project_backward(
    dx_SBQD: Tensor,
    stages: list[Tensor],
    weight: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    patch_size: int,
    needs_stages: list[bool],
    needs_weight: bool,
    needs_bias: bool,
    needs_patch: bool,
    backend: str,
) -> list[Tensor]:
    """dF of every stage, dW, dc = dst, dpos."""
    dstages, dweight = IMPLS[backend].project_backward(
        stages, weight, dx_SBQD, offsets_BQ1, mask_BL, patch_size, needs_stages, needs_weight
    )
    return [*dstages, dweight, *shift_gradients(dx_SBQD, needs_bias, needs_patch)]


@_project_backward.register_fake
def _(
    dx_SBQD: Tensor,
    stages: list[Tensor],
    weight: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    patch_size: int,
    needs_stages: list[bool],
    needs_weight: bool,
    needs_bias: bool,
    needs_patch: bool,
    backend: str,
) -> list[Tensor]:
    S, _, Q, D = dx_SBQD.shape
    needed = zip(stages, needs_stages, strict=True)
    return [
        *(stage.new_empty(stage.shape if need else (0,)) for stage, need in needed),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        dx_SBQD.new_empty((S, D) if needs_bias else (0,)),
        dx_SBQD.new_empty((Q, D) if needs_patch else (0,)),
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    stages, weight, _, offsets, mask, _, _, patch_size, backend = inputs
    ctx.save_for_backward(weight, offsets, mask, *stages)
    ctx.options = (patch_size, backend)


def _backward(ctx: Any, dx_SBQD: Tensor) -> tuple[Any, ...]:
    weight, offsets, mask, *stages = ctx.saved_tensors
    patch_size, backend = ctx.options
    wants_stages, wants_weight, wants_bias, _, _, wants_patch, wants_stage = ctx.needs_input_grad[
        :7
    ]
    *dstages, dweight, dbias, dpatch = _project_backward(
        dx_SBQD, stages, weight, offsets, mask, patch_size, list(wants_stages), wants_weight,
        wants_bias or wants_stage, wants_patch, backend,
    )  # fmt: skip
    return (
        where_wanted(dstages, wants_stages),
        dweight if wants_weight else None,
        dbias if wants_bias else None,
        None,
        None,
        dpatch if wants_patch else None,
        # the embedding of a stage is added where its bias is
        dbias if wants_stage else None,
        None,
        None,
    )


project_patches.register_autograd(_backward, setup_context=_keep)
