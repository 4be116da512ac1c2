"""CUDA C++: patches to rows and back around library GEMMs, attention whole on chip or by tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shared.gemm import wide_product

_ops = torch.ops.deepfusion_native

# compute capabilities whose `make gpu` the kernels have passed; elsewhere only on request
PROVEN_ON: frozenset[tuple[int, int]] = frozenset()

HEAD_SIZES = (16, 32, 64, 128)
# by bytes of an element: what shared memory holds of a head
SMALL_PATCHES, SMALL_HEAD = {2: 128, 4: 64}, 64
ALIGNMENT = 16
# packed rows at a time: what a second-level cache of 50 MB keeps until they are multiplied
CHUNK_BYTES, LEAST_ROWS = 16 << 20, 1024


def declines(name: str, tensor: Tensor, **facts: Any) -> str | None:
    """Two- and four-byte floats, heads of whole tiles."""
    head_size = facts.get("head_size", 16)
    if tensor.dtype == torch.float64:
        return "view-aligned attention serves float32, bfloat16 and float16, got float64"
    if head_size not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        return f"needs heads of {sizes} channels, got D / num_heads = {head_size}"
    return None


def is_small(patches: int, head_size: int, itemsize: int) -> bool:
    return patches <= SMALL_PATCHES[itemsize] and head_size <= SMALL_HEAD


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and where 16 bytes can be read at once."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _dense_rows(x_SBQD: Tensor) -> Tensor:
    """X itself if its rows can be read 16 bytes at once, else a copy."""
    *strides, last = x_SBQD.stride()
    is_dense = last == 1 and not any(s * x_SBQD.itemsize % ALIGNMENT for s in strides)
    return (
        x_SBQD
        if is_dense and x_SBQD.data_ptr() % ALIGNMENT == 0
        else x_SBQD.clone(memory_format=torch.contiguous_format)
    )


def attention_forward(
    features_SBQD: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    valid_BQ: Tensor | None,
    num_heads: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.attention_forward."""
    (S, B, Q, D), x = features_SBQD.shape, features_SBQD
    y = x.new_empty(S, B, Q, D)
    lse_BHP = x.new_empty(B, num_heads, S * Q, dtype=torch.float32)
    valid_BQ = None if valid_BQ is None else valid_BQ.contiguous()
    if is_small(S * Q, D // num_heads, x.itemsize):
        qkv = x.new_empty(S, B, Q, 3 * D)
        bias = None if qkv_bias is None else qkv_bias.contiguous()
        _ops.small_attention_forward(
            _dense_rows(x), _aligned(qkv_weight), bias, valid_BQ, num_heads, causal, scale, qkv, y,
            lse_BHP,
        )  # fmt: skip
        return y, qkv, lse_BHP
    qkv = _aligned(F.linear(x, qkv_weight, qkv_bias))
    _ops.stage_attention_forward(qkv, valid_BQ, num_heads, causal, scale, y, lse_BHP)
    return y, qkv, lse_BHP


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
    """As reference.attention_backward."""
    qkv = _aligned(qkv)
    dqkv = torch.empty_like(qkv)
    patches, head_size = lse_BHP.shape[2], dy_SBQD.shape[3] // num_heads
    small = is_small(patches, head_size, qkv.itemsize)
    backward = _ops.small_attention_backward if small else _ops.stage_attention_backward
    backward(
        qkv, lse_BHP.contiguous(), _aligned(dy_SBQD), delta_BHP.contiguous(),
        None if valid_BQ is None else valid_BQ.contiguous(), num_heads, causal, scale,
        upstream.to(torch.float32), dqkv,
    )  # fmt: skip
    return dqkv


class _Rows:
    """The rows [B Q, width] that the weight of one stage multiplies, whole or chunk by chunk."""

    def __init__(
        self, stage: Tensor, offsets_BQ1: Tensor, mask_BL: Tensor | None, patch_size: int
    ) -> None:
        B, L, D = stage.shape
        self.stage = stage if stage.stride(-1) == 1 else stage.contiguous()
        self.offsets, self.mask, self.is_pool = offsets_BQ1, mask_BL, patch_size == 0
        self.count, self.width = B * (offsets_BQ1.shape[1] - 1), max(patch_size, 1) * D
        dense = mask_BL is None and stage.is_contiguous()
        self.is_view = dense and not self.is_pool and L % patch_size == 0
        rows = max(LEAST_ROWS, CHUNK_BYTES // max(1, self.width * stage.itemsize))
        whole = self.is_view or self.is_pool
        self.step = max(1, self.count if whole else min(rows, self.count))

    def buffer(self) -> Tensor | None:
        return None if self.is_view else self.stage.new_empty(self.step, self.width)

    def chunks(self, buffer: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Where in the rows, and the rows themselves: valid until the next are asked for."""
        for first in range(0, self.count, self.step):
            rows = slice(first, min(first + self.step, self.count))
            if buffer is None:
                yield rows, self.stage.view(self.count, self.width)
                continue
            out = buffer[: rows.stop - first]
            if self.is_pool:
                _ops.pool_patches(self.stage, self.offsets, self.mask, out)
            else:
                _ops.pack_patches(self.stage, self.offsets, self.mask, first, out)
            yield rows, out

    def gradient(self, dx_ND: Tensor, weight: Tensor, buffer: Tensor | None) -> Tensor:
        """dF [B, L, D]: dX W, put back to its tokens."""
        dstage = torch.empty_like(self.stage, memory_format=torch.contiguous_format)
        if self.count == 0:
            return dstage.zero_()
        if buffer is None:
            torch.mm(dx_ND, weight, out=dstage.view(self.count, self.width))
            return dstage
        for first in range(0, self.count, self.step):
            drows = buffer[: min(self.step, self.count - first)]
            torch.mm(dx_ND[first : first + self.step], weight, out=drows)
            if self.is_pool:
                _ops.unpool_patches(drows, self.offsets, self.mask, dstage)
            else:
                _ops.unpack_patches(drows, self.offsets, self.mask, first, dstage)
        return dstage


def _tables(offsets_BQ1: Tensor, mask_BL: Tensor | None) -> tuple[Tensor, Tensor | None]:
    # whether all tokens are valid is not asked: the answer would wait for the device
    return offsets_BQ1.contiguous(), None if mask_BL is None else mask_BL.ne(0).contiguous()


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
    (B, cuts), (S, D) = offsets_BQ1.shape, bias_SD.shape
    tables, x = _tables(offsets_BQ1, mask_BL), weight.new_empty(S, B * (cuts - 1), D)
    shift = bias_SD if stage_embedding is None else bias_SD + stage_embedding
    for j, stage in enumerate(stages):
        source = _Rows(stage, *tables, patch_size)
        for rows, values in source.chunks(source.buffer()):
            torch.addmm(shift[j], values, weight[j].t(), out=x[j, rows])
    x = x.view(S, B, cuts - 1, D)
    return x if patch_embedding is None else x.add_(patch_embedding)


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
    tables, dx_SND = _tables(offsets_BQ1, mask_BL), dx_SBQD.flatten(1, 2)
    dweight = weight.new_empty(weight.shape if needs_weight else (0,))
    dstages = []
    for j, stage in enumerate(stages):
        source = _Rows(stage, *tables, patch_size)
        buffer = source.buffer() if needs_weight or needs_stages[j] else None
        if needs_weight:
            _weight_gradient(source, buffer, dx_SND[j], dweight[j])
        if needs_stages[j]:
            dstages.append(source.gradient(dx_SND[j], weight[j], buffer))
        else:
            dstages.append(stage.new_empty(0))
    return dstages, dweight


def _weight_gradient(source: _Rows, buffer: Tensor | None, dx_ND: Tensor, out: Tensor) -> None:
    """out = dX^T rows, chunks summed in float32."""
    if source.count <= source.step:
        out.zero_()
        for _, values in source.chunks(buffer):
            torch.mm(dx_ND.t(), values, out=out)
        return
    total = torch.zeros_like(out, dtype=torch.float32)
    part = torch.empty_like(total)
    for rows, values in source.chunks(buffer):
        wide_product(dx_ND[rows].t(), values, part)
        total += part
    out.copy_(total)
