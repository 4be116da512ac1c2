"""Linear layer and mean squared error to a target, without the predictions in memory.

    R_n = U y_n + u - G_n        loss = sum_n w_n |R_n|^2 / (M sum_n w_n)

The gradients are formed in the forward pass, where R is at hand; backward scales them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...checks import expect, expect_option, expect_that
from ..shared import patches
from ..shared.gradients import scaled, wants
from . import native_cuda, native_impl, reference, triton_impl
from .arguments import OP, check, check_patches

DOORS = ("fused_linear_mse",)
IMPLS = {
    "reference": reference,
    "cpu": native_impl,
    "cuda": native_cuda,
    "triton": triton_impl,
}


def fused_linear_mse(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    row_weight: Tensor | None = None,
    target_norm: bool = False,
    patch_size: int | None = None,
    target_offsets: Tensor | None = None,
    target_mask: Tensor | None = None,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean squared error of a linear layer's output, never materialised.

        'mean': sum_n w_n |U y_n + u - g_n|^2 / (M sum_n w_n)    'sum': sum_n w_n |.|^2
        'none': w_n |.|^2 / M, one a row

    features [..., D], weight [M, D], bias [M] or None, target [..., M], row_weight [...] -> float32
    (float64 for float64). With patch_size or target_offsets [B, Q+1] int32 the features are
    [B, Q, D], the target [B, L, M] tokens, and g the mean of a patch's tokens where target_mask
    [B, L] is set; a patch without any has weight 0. Rows of weight 0 are never read. target_norm
    layer-normalises g. Target and row weights take no gradient. Raises ValueError for shapes,
    dtypes, devices, options. Source: arXiv 2602.14301, eq. 9.
    """
    expect_option(reduction, OP, "reduction", ("mean", "sum", "none"))
    M, D = expect(weight, OP, "weight", "M D")
    pooled = patch_size is not None or target_offsets is not None
    rows = check(features, weight, bias, target, row_weight, chunk_rows, pooled)
    if pooled:
        target_BLM, mask_BL = target, target_mask
        offsets = check_patches(rows, target, patch_size, target_offsets, target_mask)
    else:
        expect_that(
            target_mask is None, OP, "target_mask", "None for rows; use row_weight", "a tensor"
        )
        target_BLM, mask_BL = target.reshape(1, -1, M), None
        offsets = patches.even_offsets(1, target_BLM.shape[1], 1, target.device)
    inputs = (
        features.reshape(-1, D),
        weight,
        bias,
        target_BLM,
        offsets,
        mask_BL,
        None if row_weight is None else row_weight.reshape(-1),
        target_norm,
        chunk_rows or 0,
    )
    chosen = backends.choose(backend, features, IMPLS)
    if reduction == "none":
        sse_N, weights_N = _rows(*inputs, chosen)
        return torch.mul(sse_N, weights_N / M).reshape(rows)
    total: Tensor
    total, weight_sum, *_ = _total(*inputs, *wants(features, weight, bias), chosen)
    if reduction == "sum":
        return total
    return total * mean_factor(weight_sum, M)


def mean_factor(weight_sum: Tensor, width: int) -> Tensor:
    """1 / (M sum w), or 0 where nothing counts."""
    return torch.where(weight_sum > 0, 1 / (width * weight_sum.clamp(min=1e-30)), 0)


def row_weights(
    offsets_BQ1: Tensor, mask_BL: Tensor | None, weight_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """w [N] in the wide type: 1 or the given weight where the patch holds a valid token, else 0."""
    valid_N = patches.counts(offsets_BQ1, mask_BL).flatten() > 0
    wide = patches.wide_dtype(dtype)
    return valid_N.to(wide) if weight_N is None else torch.where(valid_N, weight_N.to(wide), 0)


def errors(
    features_ND: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_BLM: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    scale_N: Tensor,
    target_norm: bool,
    chunk_rows: int,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """|R_n|^2 and the gradients of sum_n scale_n |R_n|^2; for callers inside an opaque op."""
    result: tuple[Tensor, Tensor, Tensor, Tensor] = IMPLS[backend].forward(
        features_ND, weight, bias, target_BLM, offsets_BQ1, mask_BL, scale_N, target_norm,
        chunk_rows, *needs,
    )  # fmt: skip
    return result


@torch.library.custom_op("deepfusion::fused_linear_mse", mutates_args=())
def _total(
    features_ND: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_BLM: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    weight_N: Tensor | None,
    target_norm: bool,
    chunk_rows: int,
    needs_features: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """sum_n w_n |R_n|^2, sum_n w_n, and the gradients of the first."""
    offsets = patches.checked_offsets(offsets_BQ1, target_BLM.shape[1], OP, "target_offsets")
    w_N = row_weights(offsets, mask_BL, weight_N, features_ND.dtype)
    sse_N, *gradients = errors(
        features_ND, weight, bias, target_BLM, offsets, mask_BL, w_N, target_norm, chunk_rows,
        (needs_features, needs_weight, needs_bias), backend,
    )  # fmt: skip
    dfeatures, dweight, dbias = gradients
    return torch.dot(w_N, sse_N), w_N.sum(), dfeatures, dweight, dbias


@_total.register_fake
def _(
    features_ND: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_BLM: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    weight_N: Tensor | None,
    target_norm: bool,
    chunk_rows: int,
    needs_features: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = patches.wide_dtype(features_ND.dtype)
    return (
        features_ND.new_empty((), dtype=wide),
        features_ND.new_empty((), dtype=wide),
        features_ND.new_empty(features_ND.shape if needs_features else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,), dtype=wide),
        weight.new_empty(weight.shape[:1] if needs_bias else (0,), dtype=wide),
    )


@torch.library.custom_op("deepfusion::fused_linear_mse_backward", mutates_args=())
def _scaled(
    upstream: Tensor,
    dfeatures: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    features: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients times the scalar upstream, in the dtype of the features.

    Features and weight are named so that a second derivative is refused and not taken for zero.
    """
    dtype = features.dtype
    return (
        scaled(dfeatures, upstream, dtype),
        scaled(dweight, upstream, dtype),
        scaled(dbias, upstream, dtype),
    )


@_scaled.register_fake
def _(
    upstream: Tensor,
    dfeatures: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    features: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(dfeatures),
        torch.empty_like(dweight, dtype=features.dtype),
        torch.empty_like(dbias, dtype=features.dtype),
    )


def _keep_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:], *inputs[:2])


def _total_backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 13
    gradients = _scaled(upstream, *ctx.saved_tensors)
    wanted = ctx.needs_input_grad[:3]
    kept = [g if want else None for g, want in zip(gradients, wanted, strict=True)]
    return (*kept, *(None,) * 10)


_total.register_autograd(_total_backward, setup_context=_keep_total)


@torch.library.custom_op("deepfusion::fused_linear_mse_rows", mutates_args=())
def _rows(
    features_ND: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_BLM: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    weight_N: Tensor | None,
    target_norm: bool,
    chunk_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """|R_n|^2 where w_n is not 0, and w_n."""
    offsets = patches.checked_offsets(offsets_BQ1, target_BLM.shape[1], OP, "target_offsets")
    w_N = row_weights(offsets, mask_BL, weight_N, features_ND.dtype)
    sse_N = errors(
        features_ND, weight, bias, target_BLM, offsets, mask_BL, w_N, target_norm, chunk_rows,
        (False, False, False), backend,
    )[0]  # fmt: skip
    return sse_N, w_N


@_rows.register_fake
def _(
    features_ND: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_BLM: Tensor,
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    weight_N: Tensor | None,
    target_norm: bool,
    chunk_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    wide = patches.wide_dtype(features_ND.dtype)
    sse_N = features_ND.new_empty(features_ND.shape[:1], dtype=wide)
    return sse_N, torch.empty_like(sse_N)


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.options = inputs[7:]


def _rows_backward(ctx: Any, upstream_N: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    """Row by row the upstream differs: the errors are formed again, scaled by it."""
    if upstream_N is None:
        return (None,) * 10
    *inputs, w_N = ctx.saved_tensors
    target_norm, chunk_rows, backend = ctx.options
    wanted = ctx.needs_input_grad[:3]
    scale_N = torch.where(w_N != 0, upstream_N, 0)
    _, _, *gradients = _total(*inputs, scale_N, target_norm, chunk_rows, *wanted, backend)
    kept = [
        g.to(inputs[1].dtype) if want else None for g, want in zip(gradients, wanted, strict=True)
    ]
    return (*kept, *(None,) * 7)


_rows.register_autograd(_rows_backward, setup_context=_keep_rows)
