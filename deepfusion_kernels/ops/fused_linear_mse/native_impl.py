"""All stages in one C++ call where it multiplies the dtype; else rows in chunks, library GEMMs
around one C++ pass that pools, subtracts, squares and scales."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..shared import patches
from ..shared.gemm import add_product, product

# accumulator of a chunk: small beside a second-level cache, large enough for a full-speed GEMM
CHUNK_BYTES = 1 << 20
LEAST_ROWS = 64


def rows_per_chunk(width: int, itemsize: int) -> int:
    return max(LEAST_ROWS, CHUNK_BYTES // (width * itemsize))


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether our own products serve this dtype on this processor."""
    found: bool = torch.ops.deepfusion_native.linear_mse_multiplies(torch.empty(0, dtype=dtype))
    return found


def serves_stages(features: Tensor, weight: Tensor) -> bool:
    """Whether `forward_stages` multiplies such rows: bfloat16 goes in pairs along both depths."""
    M, D = weight.shape[-2:]
    is_paired = weight.dtype != torch.bfloat16 or M % 2 == D % 2 == 0
    return is_paired and features.numel() * M > 0 and _multiplies(weight.dtype)


def forward_stages(
    features_SND: Tensor,
    weight_SMD: Tensor,
    bias_SM: Tensor | None,
    targets: Sequence[Tensor],
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    scale_SN: Tensor,
    target_norm: bool,
    chunk_rows: int,
    needs_features: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward` of every stage at once; a target [B, L, M] a stage."""
    sse_SN, dfeatures, dweight, dbias = torch.ops.deepfusion_native.linear_mse_stages.default(
        features_SND.contiguous(),
        weight_SMD.contiguous(),
        None if bias_SM is None else bias_SM.contiguous(),
        [target if target.stride(-1) == 1 else target.contiguous() for target in targets],
        offsets_BQ1.contiguous(),
        None if mask_BL is None else mask_BL.ne(0).contiguous(),
        scale_SN.contiguous(),
        target_norm,
        chunk_rows,
        needs_features,
        needs_weight,
        needs_bias,
    )
    return sse_SN, dfeatures, dweight, dbias


def loss_and_gradients(
    features_ND: Tensor,
    weight_MD: Tensor,
    bias_M: Tensor | None,
    target_BLM: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    weight_N: Tensor | None,
    is_mean: bool,
    target_norm: bool,
    chunk_rows: int,
    needs_features: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """loss, factor, dfeatures, dweight, dbias in one call; None where the steps are to serve."""
    if not serves_stages(features_ND, weight_MD):
        return None
    found: list[Tensor] = torch.ops.deepfusion_native.linear_mse_loss.default(
        features_ND.contiguous(),
        weight_MD.contiguous(),
        None if bias_M is None else bias_M.contiguous(),
        target_BLM if target_BLM.stride(-1) == 1 else target_BLM.contiguous(),
        offsets_BQ1.contiguous(),
        None if mask_BL is None else mask_BL.ne(0).contiguous(),
        None if weight_N is None else weight_N.to(torch.float32).contiguous(),
        is_mean,
        target_norm,
        chunk_rows,
        needs_features,
        needs_weight,
        needs_bias,
    )
    if not found:
        return None
    loss, factor, dfeatures, dweight, dbias = found
    return loss, factor, dfeatures, dweight, dbias


def scaled_gradients(
    upstream: Tensor,
    factor: Tensor,
    dfeatures: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    features: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradients times upstream and factor in one call; None where the steps are to serve."""
    if not _multiplies(features.dtype):
        return None
    scaled: tuple[Tensor, Tensor, Tensor] = torch.ops.deepfusion_native.linear_mse_scaled.default(
        upstream, factor, dfeatures, dweight, dbias, features
    )
    return scaled


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
    if serves_stages(features_ND, weight_MD):
        sse, *gradients = forward_stages(
            features_ND[None], weight_MD[None], None if bias_M is None else bias_M[None],
            [target_BLM], offsets_BQ1, mask_BL, scale_N[None], target_norm, chunk_rows,
            needs_features, needs_weight, needs_bias,
        )  # fmt: skip
        dfeatures, dweight, dbias = (g[0] if g.numel() else g for g in gradients)
        return sse[0], dfeatures, dweight, dbias
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
