"""Rows in chunks: library GEMMs around one C++ pass that pools, subtracts, squares and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shared import patches
from ..shared.gemm import add_product, product

# accumulator of a chunk: small beside a second-level cache, large enough for a full-speed GEMM
CHUNK_BYTES = 1 << 20
LEAST_ROWS = 64


def rows_per_chunk(width: int, itemsize: int) -> int:
    return max(LEAST_ROWS, CHUNK_BYTES // (width * itemsize))


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
    (N, D), M = features_ND.shape, weight_MD.shape[0]
    target_BLM = target_BLM if target_BLM.stride(-1) == 1 else target_BLM.contiguous()
    offsets_BQ1 = offsets_BQ1.contiguous()
    mask_BL = None if mask_BL is None else mask_BL.ne(0).contiguous()
    dtype, wide = features_ND.dtype, patches.wide_dtype(features_ND.dtype)
    chunk = min(N, chunk_rows or rows_per_chunk(M, wide.itemsize))
    # the error is a small difference near convergence: never taken from a rounded prediction
    wide_weight = weight_MD.to(wide)
    sse_N = features_ND.new_empty(N, dtype=wide)
    dfeatures = features_ND.new_empty((N, D) if needs_features else 0)
    dweight = sse_N.new_zeros((M, D) if needs_weight else 0)
    dbias = sse_N.new_zeros(M if needs_bias else 0)
    buffer = sse_N.new_empty((chunk, M))
    native_epilogue = torch.ops.deepfusion_native.linear_mse_epilogue
    for first in range(0, N, max(chunk, 1)):
        rows = slice(first, min(first + chunk, N))
        y_CD, error_CM = features_ND[rows], buffer[: rows.stop - first]
        torch.mm(y_CD.to(wide), wide_weight.t(), out=error_CM)
        native_epilogue(
            error_CM, bias_M, target_BLM, offsets_BQ1, mask_BL, scale_N, sse_N, first, target_norm
        )
        derror_CM = error_CM.to(dtype) if needs_features or needs_weight else error_CM
        if needs_features:
            product(derror_CM, weight_MD, dfeatures[rows])
        if needs_weight:
            add_product(dweight, derror_CM.t(), y_CD)
        if needs_bias:
            dbias += error_CM.sum(0)
    return sse_N, dfeatures, dweight, dbias
