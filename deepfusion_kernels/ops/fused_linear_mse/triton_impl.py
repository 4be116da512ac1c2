"""Rows in chunks: the library's GEMMs around one Triton pass that pools, subtracts and squares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._triton import triton
from ..shared.gemm import wide_product
from .triton_rows import _error_kernel

# products and errors of a chunk stay in a second-level cache of 50 MB, with room for what it reads
CHUNK_BYTES = 16 << 20
LEAST_ROWS = 64
BLOCK_M, BLOCK_T = 1024, 8
LAUNCH = {"num_warps": 8, "maxnreg": 128}


def declines(name: str, tensor: Tensor, **facts: Any) -> str | None:
    """Triton serves two- and four-byte floats."""
    if tensor.dtype == torch.float64:
        return "fused_linear_mse serves float32, bfloat16 and float16, got float64"
    return None


def rows_per_chunk(rows: int, width: int, itemsize: int) -> int:
    """Equal chunks, whose float32 products and errors fit CHUNK_BYTES."""
    errors = 0 if itemsize == 4 else itemsize
    most = max(LEAST_ROWS, CHUNK_BYTES // (width * (4 + errors)))
    chunks = max(1, triton.cdiv(rows, most))
    return LEAST_ROWS * int(triton.cdiv(triton.cdiv(rows, chunks), LEAST_ROWS))


def forward(
    features_ND: Tensor,
    weight_MD: Tensor,
    bias_M: Tensor | None,
    target_BLM: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    scale_N: Tensor,
    target_norm: bool,
    chunk_rows: int,
    needs_features: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.forward, without a tensor of N M elements."""
    (N, D), M, dtype = features_ND.shape, weight_MD.shape[0], features_ND.dtype
    sse_N = features_ND.new_empty(N, dtype=torch.float32)
    dfeatures = features_ND.new_empty((N, D) if needs_features else 0)
    dweight = sse_N.new_empty((M, D) if needs_weight else 0)
    dbias = sse_N.new_zeros(M if needs_bias else 0)
    if N == 0:
        return sse_N, dfeatures, dweight.zero_(), dbias
    chunk = min(N, chunk_rows or rows_per_chunk(N, M, dtype.itemsize))
    products, errors = sse_N.new_empty(chunk, M), None
    keep = needs_bias or (dtype == torch.float32 and (needs_features or needs_weight))
    if needs_features or needs_weight:
        # an error of four bytes takes its product's place
        errors = products if dtype == torch.float32 else features_ND.new_empty(chunk, M)
    part = torch.empty_like(dweight) if needs_weight and chunk < N else dweight
    epilogue = _Epilogue(bias_M, target_BLM, offsets_BQ1, mask_BL, scale_N, sse_N, target_norm)
    for first in range(0, N, chunk):
        rows = slice(first, min(first + chunk, N))
        y_CD, count = features_ND[rows], rows.stop - first
        wide_product(y_CD, weight_MD.t(), products[:count])
        epilogue(products, errors, keep, first, count)
        if needs_bias:
            dbias += products[:count].sum(0)
        if errors is None:
            continue
        error_CM = errors[:count]
        if needs_features:
            torch.mm(error_CM, weight_MD, out=dfeatures[rows])
        if needs_weight:
            wide_product(error_CM.t(), y_CD, dweight if first == 0 else part)
            if first > 0:
                dweight += part
    return sse_N, dfeatures, dweight, dbias


class _Epilogue:
    """The launch between the GEMMs, on what does not change from chunk to chunk."""

    def __init__(
        self,
        bias_M: Tensor | None,
        target_BLM: Tensor,
        offsets_BQ1: Tensor,
        mask_BL: Tensor | None,
        scale_N: Tensor,
        sse_N: Tensor,
        target_norm: bool,
    ) -> None:
        self.target = target_BLM if target_BLM.stride(2) == 1 else target_BLM.contiguous()
        self.bias = None if bias_M is None else bias_M.contiguous()
        self.offsets = offsets_BQ1.contiguous()
        if mask_BL is not None and mask_BL.dtype != torch.bool:
            mask_BL = mask_BL.ne(0)
        self.mask = None if mask_BL is None else mask_BL.contiguous()
        self.scale, self.sse, self.norm = scale_N.float().contiguous(), sse_N, target_norm

    def __call__(
        self, products: Tensor, errors: Tensor | None, keep: bool, first: int, count: int
    ) -> None:
        narrow = None if errors is products else errors
        L, M = self.target.shape[1:]
        Q = self.offsets.shape[1] - 1
        tokens = max(1, triton.next_power_of_2(triton.cdiv(L, Q)))
        with torch.cuda.device_of(products):
            _error_kernel[(count,)](
                products, self.bias, (self.target, *self.target.stride()[:2]), self.offsets,
                self.mask, self.scale, self.sse, narrow, (first, Q, L, M), NORM=self.norm,
                KEEP=keep, BLOCK_T=min(BLOCK_T, tokens),
                BLOCK_M=min(BLOCK_M, max(16, triton.next_power_of_2(M))), **LAUNCH,
            )  # fmt: skip
