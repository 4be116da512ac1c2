"""Launches of the patch projection: one GEMM over all stages, which are read in place.

pool first writes the means of the patches, 1 / p of the stages' bytes, and goes on with them as
patches of one token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._triton import triton
from .triton_patches import _dstage_kernel, _dweight_kernel, _pool_kernel, _project_kernel

MAX_STAGES = 8
POOL_COLUMNS, POOL_TOKENS = 512, 8
POOL_LAUNCH = {"num_warps": 4, "maxnreg": 128}
# fewer wide tiles than this leave most of a GPU idle; not measured
ENOUGH_TILES = 96

Tile = tuple[tuple[int, int, int], Mapping[str, int]]
# rows, columns, step of the sum; not measured: what compiles without spills for all four targets
WIDE: Tile = ((128, 256, 32), {"num_warps": 8, "num_stages": 4, "maxnreg": 255})
# where every row begins with an embedding of its own, or ends at addresses of its own
MEDIUM: Tile = ((128, 128, 64), {"num_warps": 8, "num_stages": 3, "maxnreg": 255})
NARROW: Tile = ((64, 32, 128), {"num_warps": 4, "num_stages": 3, "maxnreg": 255})
# NOTE: from 64 rows on, Triton 3.6 multiplies float32 as TF32 on sm_100, asked for "ieee" or not
FLOAT32: Tile = ((32, 64, 16), {"num_warps": 4, "num_stages": 2, "maxnreg": 255})


class Source(NamedTuple):
    """What the weights multiply: token tensors by pointer, their sizes, their mask."""

    stages: tuple[Tensor, ...]
    mask_BL: Tensor | None
    batch: int
    patches: int
    tokens: int
    columns: int
    slots: int

    @property
    def rows(self) -> int:
        return self.batch * self.patches

    def sizes(self, width: int) -> tuple[int, ...]:
        return self.rows, self.patches, self.tokens, self.columns, self.slots, width

    def arguments(self) -> tuple[tuple[Tensor, ...] | tuple[int, ...], ...]:
        batch = tuple(stage.stride(0) for stage in self.stages)
        return self.stages, batch, tuple(stage.stride(1) for stage in self.stages)


def kept_tokens(mask_BL: Tensor | None) -> Tensor | None:
    """The mask as contiguous bool; one that is so already costs nothing."""
    if mask_BL is None:
        return None
    return (mask_BL if mask_BL.dtype == torch.bool else mask_BL.ne(0)).contiguous()


def tile(like: Tensor, rows: int, columns: int, groups: int, widest: Tile = WIDE) -> Tile:
    """The widest tile where there are enough of them to fill a GPU."""
    if like.dtype == torch.float32:
        return FLOAT32
    height, width, _ = widest[0]
    count = groups * triton.cdiv(rows, height) * triton.cdiv(columns, width)
    return widest if count >= ENOUGH_TILES else NARROW


def source(
    stages: Sequence[Tensor], offsets_BQ1: Tensor, mask_BL: Tensor | None, patch_size: int
) -> Source:
    """The stages themselves (conv), or the means of their patches as patches of one token."""
    (B, L, C), Q = stages[0].shape, offsets_BQ1.shape[1] - 1
    dense = tuple(stage if stage.stride(-1) == 1 else stage.contiguous() for stage in stages)
    tokens = Source(dense, kept_tokens(mask_BL), B, Q, L, C, patch_size)
    if patch_size:
        return tokens
    means = stages[0].new_empty(len(stages), B, Q, C)
    if means.numel():
        grid = (B * Q, triton.cdiv(C, POOL_COLUMNS), len(stages))
        with torch.cuda.device_of(means):
            _pool_kernel[grid](
                *tokens.arguments(), offsets_BQ1.contiguous(), tokens.mask_BL, means,
                (B * Q, Q, L, C), COUNT=len(stages), BLOCK_T=POOL_TOKENS,
                BLOCK_C=min(POOL_COLUMNS, triton.next_power_of_2(C)), **POOL_LAUNCH,
            )  # fmt: skip
    return Source(tuple(means.unbind()), None, B, Q, Q, C, 1)


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
    """As reference.project_forward."""
    rows = source(stages, offsets_BQ1, mask_BL, patch_size)
    S, D = bias_SD.shape
    x = weight.new_empty(S, rows.batch, rows.patches, D)
    if x.numel() == 0:
        return x
    widest = WIDE if patch_embedding is None else MEDIUM
    (block_n, block_d, block_c), launch = tile(x, rows.rows, D, S, widest)
    grid = (triton.cdiv(rows.rows, block_n) * triton.cdiv(D, block_d), S)
    dense = (None if e is None else e.contiguous() for e in (patch_embedding, stage_embedding))
    with torch.cuda.device_of(x):
        _project_kernel[grid](
            *rows.arguments(), rows.mask_BL, weight.contiguous(), bias_SD.contiguous(), *dense, x,
            rows.sizes(D), COUNT=S, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_C=block_c, **launch,
        )  # fmt: skip
    return x


def _dweight(rows: Source, dx: Tensor, dweight: Tensor) -> None:
    S, D = dweight.shape[:2]
    (block_d, block_c, block_n), launch = tile(dx, D, rows.slots * rows.columns, S)
    grid = (triton.cdiv(D, block_d) * rows.slots * triton.cdiv(rows.columns, block_c), S)
    with torch.cuda.device_of(dx):
        _dweight_kernel[grid](
            *rows.arguments(), rows.mask_BL, dx, dweight, rows.sizes(D), COUNT=S,
            BLOCK_D=block_d, BLOCK_C=block_c, BLOCK_N=block_n, **launch,
        )  # fmt: skip


def _dstages(
    dstages: dict[int, Tensor],
    weight: Tensor,
    dx: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    slots: int,
) -> None:
    """slots 0: the gradient of a mean goes to every token of the patch."""
    numbers, out = tuple(dstages), tuple(dstages.values())
    (B, L, C), (Q, D) = out[0].shape, dx.shape[2:]
    width = max(slots, 1)
    widest = WIDE if slots else MEDIUM
    (block_n, block_c, block_d), launch = tile(dx, B * Q, width * C, len(out), widest)
    grid = (triton.cdiv(B * Q, block_n) * width * triton.cdiv(C, block_c), len(out))
    with torch.cuda.device_of(dx):
        _dstage_kernel[grid](
            out, numbers, offsets_BQ1.contiguous(), kept_tokens(mask_BL), dx, weight.contiguous(),
            (B * Q, Q, L, C, width, D), COUNT=len(out), POOL=slots == 0, BLOCK_N=block_n,
            BLOCK_C=block_c, BLOCK_D=block_d, **launch,
        )  # fmt: skip


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
    """As reference.project_backward."""
    dx = dx_SBQD.contiguous()
    dweight = weight.new_empty(weight.shape if needs_weight else (0,))
    dstages = [
        stage.new_empty(stage.shape if need else (0,))
        for stage, need in zip(stages, needs_stages, strict=True)
    ]
    if dx.numel() == 0:
        # no patch: what there is of tokens lies outside every one
        for gradient in (dweight, *dstages):
            gradient.zero_()
        return dstages, dweight
    if needs_weight:
        _dweight(source(stages, offsets_BQ1, mask_BL, patch_size), dx, dweight)
    wanted = {j: dstages[j] for j, need in enumerate(needs_stages) if need}
    if wanted:
        _dstages(wanted, weight, dx, offsets_BQ1, mask_BL, patch_size)
    return dstages, dweight
