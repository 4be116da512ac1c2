"""Rows in chunks: the library's GEMMs around one CUDA C++ pass that pools, subtracts, squares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shared.gemm import wide_product

_ops = torch.ops.deepfusion_native

# compute capabilities whose `make gpu` the kernels have passed; elsewhere only on request
PROVEN_ON: frozenset[tuple[int, int]] = frozenset()

# products and errors of a chunk stay in a second-level cache of 50 MB, with room for what it reads
CHUNK_BYTES, LEAST_ROWS = 16 << 20, 64


def declines(name: str, tensor: Tensor, **facts: Any) -> str | None:
    """Two- and four-byte floats."""
    if tensor.dtype == torch.float64:
        return "fused_linear_mse serves float32, bfloat16 and float16, got float64"
    return None


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
    target = target_BLM if target_BLM.stride(-1) == 1 else target_BLM.contiguous()
    bias = None if bias_M is None else bias_M.contiguous()
    mask = None if mask_BL is None else mask_BL.ne(0).contiguous()
    offsets, scale = offsets_BQ1.contiguous(), scale_N.float().contiguous()
    rows_that_fit = max(LEAST_ROWS, CHUNK_BYTES // max(1, M * (4 + dtype.itemsize)))
    chunk = max(1, min(N, chunk_rows or rows_that_fit))
    sse_N = features_ND.new_empty(N, dtype=torch.float32)
    dfeatures = features_ND.new_empty((N, D) if needs_features else 0)
    dweight = sse_N.new_zeros((M, D) if needs_weight else 0)
    dbias = sse_N.new_zeros(M if needs_bias else 0)
    products = sse_N.new_empty(chunk, M)
    part = torch.empty_like(dweight)
    for first in range(0, N, chunk):
        rows = slice(first, min(first + chunk, N))
        y_CD, error_CM = features_ND[rows], products[: rows.stop - first]
        # the error is a small difference near convergence: never taken from a rounded prediction
        wide_product(y_CD, weight_MD.t(), error_CM)
        _ops.linear_mse_epilogue(
            error_CM, bias, target, offsets, mask, scale, sse_N, first, target_norm
        )
        if needs_bias:
            dbias += error_CM.sum(0)
        if not (needs_features or needs_weight):
            continue
        derror_CM = error_CM.to(dtype)
        if needs_features:
            torch.mm(derror_CM, weight_MD, out=dfeatures[rows])
        if needs_weight:
            wide_product(derror_CM.t(), y_CD, part)
            dweight += part
    return sse_N, dfeatures, dweight, dbias
