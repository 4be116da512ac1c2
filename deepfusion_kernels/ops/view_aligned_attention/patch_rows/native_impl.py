"""Patches to rows and back: in one C++ call where it multiplies the dtype, else C++ passes between
library GEMMs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...shared import patches
from ...shared.gemm import add_product, product

# rows packed at a time: few enough for the cache, enough for a full-speed GEMM; not tuned further
CHUNK_BYTES = 4 << 20
LEAST_ROWS = 128


def dense_rows(stage: Tensor) -> Tensor:
    return stage if stage.stride(-1) == 1 else stage.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def needed_mask(mask_BL: Tensor | None) -> Tensor | None:
    """None where every token is valid: such a mask costs a packing pass."""
    if mask_BL is None or bool(mask_BL.all()):
        return None
    return mask_BL.ne(0).contiguous()


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether our own products serve this dtype on this processor."""
    found: bool = torch.ops.deepfusion_native.multiplies_rows(torch.empty(0, dtype=dtype))
    return found


def is_direct(
    stages: Sequence[Tensor], weight: Tensor, mask_BL: Tensor | None, patch_size: int
) -> bool:
    """Whether all stages go through one call that multiplies rows where they lie."""
    (B, L, H), (_, D, width) = stages[0].shape, weight.shape
    # bfloat16 is multiplied in pairs along both depths
    is_paired = weight.dtype != torch.bfloat16 or D % 2 == width % 2 == 0
    if not (is_paired and B * L * H * D and multiplies(weight.dtype)):
        return False
    if patch_size == 0:
        return True
    if any(stage.stride(1) != H for stage in stages):
        return False
    return mask_BL is None or bool(
        torch.ops.deepfusion_native.reads_in_place.default(mask_BL, patch_size)
    )


class _Rows:
    """The rows [B Q, width] that the weight of one stage multiplies, whole or chunk by chunk."""

    def __init__(
        self, stage: Tensor, offsets_BQ1: Tensor, mask_BL: Tensor | None, patch_size: int
    ) -> None:
        B, L, D = stage.shape
        self.stage, self.offsets, self.mask = dense_rows(stage), offsets_BQ1, mask_BL
        self.count, self.width = B * (offsets_BQ1.shape[1] - 1), max(patch_size, 1) * D
        self.is_view = (
            patch_size > 0 and mask_BL is None and L % patch_size == 0 and stage.is_contiguous()
        )
        self.is_pool = patch_size == 0
        chunk = max(LEAST_ROWS, CHUNK_BYTES // max(1, self.width * stage.itemsize))
        whole = self.is_view or self.is_pool
        self.chunk = max(1, self.count if whole else min(chunk, self.count))

    def chunks(self) -> list[slice]:
        return [
            slice(first, min(first + self.chunk, self.count))
            for first in range(0, self.count, self.chunk)
        ]

    def buffer(self) -> Tensor | None:
        if self.is_view:
            return None
        # float16 is multiplied in float32 anyway: its means need not be rounded in between
        is_wide = self.is_pool and self.stage.dtype == torch.float16
        dtype = torch.float32 if is_wide else self.stage.dtype
        return self.stage.new_empty(self.chunk, self.width, dtype=dtype)

    def read(self, rows: slice, buffer: Tensor | None) -> Tensor:
        """Rows of the stage, in the buffer unless they are a view."""
        if buffer is None:
            return self.stage.view(self.count, self.width)
        out = buffer[: rows.stop - rows.start]
        if self.is_pool:
            torch.ops.deepfusion_native.pool_patches(self.stage, self.offsets, self.mask, out)
        else:
            torch.ops.deepfusion_native.pack_patches(
                self.stage, self.offsets, self.mask, rows.start, out
            )
        return out

    def gradient(self, dx_ND: Tensor, weight: Tensor, buffer: Tensor | None) -> Tensor:
        """dF [B, L, D]: dX W, put back to its tokens."""
        dstage = torch.empty_like(self.stage, memory_format=torch.contiguous_format)
        if self.count == 0:
            return dstage.zero_()
        if buffer is None:
            product(dx_ND, weight, dstage.view(self.count, self.width))
            return dstage
        for rows in self.chunks():
            out = buffer[: rows.stop - rows.start]
            product(dx_ND[rows], weight, out)
            if self.is_pool:
                torch.ops.deepfusion_native.unpool_patches(out, self.offsets, self.mask, dstage)
            else:
                torch.ops.deepfusion_native.unpack_patches(
                    out, self.offsets, self.mask, rows.start, dstage
                )
        return dstage


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
    """As reference.project_forward: no stack of the stages, at most one packed chunk of rows."""
    B, Q = offsets_BQ1.shape[0], offsets_BQ1.shape[1] - 1
    S, D = bias_SD.shape
    offsets_BQ1, mask_BL = offsets_BQ1.contiguous(), needed_mask(mask_BL)
    stages, x = [dense_rows(stage) for stage in stages], weight.new_empty(S, B * Q, D)
    if Q and is_direct(stages, weight, mask_BL, patch_size):
        torch.ops.deepfusion_native.project_patches(
            stages, weight.contiguous(), bias_SD.contiguous(), contiguous(patch_embedding),
            contiguous(stage_embedding), offsets_BQ1, mask_BL, patch_size, x,
        )  # fmt: skip
        return x.view(S, B, Q, D)
    for j, stage in enumerate(stages):
        source = _Rows(stage, offsets_BQ1, mask_BL, patch_size)
        buffer = source.buffer()
        for rows in source.chunks():
            product(source.read(rows, buffer), weight[j].t(), x[j, rows])
    x = x.view(S, B, Q, D)
    shift = bias_SD if stage_embedding is None else bias_SD + stage_embedding
    if patch_embedding is not None:
        return x.add_(shift[:, None, None] + patch_embedding)
    return x.add_(shift[:, None, None])


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
    wide = patches.wide_dtype(weight.dtype)
    offsets_BQ1, mask_BL = offsets_BQ1.contiguous(), needed_mask(mask_BL)
    stages = [dense_rows(stage) for stage in stages]
    if dx_SBQD.numel() and is_direct(stages, weight, mask_BL, patch_size):
        *direct, last = torch.ops.deepfusion_native.project_patches_backward(
            stages, weight.contiguous(), dx_SBQD.contiguous(), offsets_BQ1, mask_BL, patch_size,
            list(map(int, needs_stages)), needs_weight,
        )  # fmt: skip
        return direct, last
    dx_SND = dx_SBQD.flatten(1, 2)
    dweight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    dstages = []
    for j, stage in enumerate(stages):
        source = _Rows(stage, offsets_BQ1, mask_BL, patch_size)
        buffer, chunks = source.buffer(), source.chunks()
        if needs_weight and len(chunks) == 1:
            product(dx_SND[j].t(), source.read(chunks[0], buffer), dweight[j])
        elif needs_weight:
            total = weight.new_zeros(weight.shape[1:], dtype=wide)
            for rows in chunks:
                add_product(total, dx_SND[j, rows].t(), source.read(rows, buffer))
            dweight[j] = total
        if needs_stages[j]:
            dstages.append(source.gradient(dx_SND[j], weight[j], buffer))
        else:
            dstages.append(stage.new_empty(0))
    return dstages, dweight
