"""The loss of all rows and its gradients, formed in the forward pass; backward scales them.

loss = factor sum_n w_n |R_n|^2        factor = 1 / (M sum_n w_n), 0 if nothing counts; or 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..shared import patches
from ..shared.gradients import scaled, where_wanted
from ..shared.watched import is_watched
from . import native_impl
from .arguments import OP
from .errors import IMPLS, errors, row_weights


def loss_and_gradients(
    features_ND: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, its factor, and the gradients of the sum without the factor."""
    needs = (needs_features, needs_weight, needs_bias)
    if IMPLS[backend] is native_impl:
        found = native_impl.loss_and_gradients(
            features_ND, weight, bias, target_BLM, offsets_BQ1, mask_BL, weight_N, is_mean,
            target_norm, chunk_rows, *needs,
        )  # fmt: skip
        if found is not None:
            return found
    offsets = patches.checked_offsets(offsets_BQ1, target_BLM.shape[1], OP, "target_offsets")
    w_N = row_weights(offsets, mask_BL, weight_N, features_ND.dtype)
    sse_N, dfeatures, dweight, dbias = errors(
        features_ND, weight, bias, target_BLM, offsets, mask_BL, w_N, target_norm, chunk_rows,
        needs, backend,
    )  # fmt: skip
    factor = _mean_factor(w_N.sum(), weight.shape[0]) if is_mean else w_N.new_ones(())
    return torch.dot(w_N, sse_N) * factor, factor, dfeatures, dweight, dbias


def _mean_factor(weight_sum: Tensor, width: int) -> Tensor:
    """1 / (M sum w), or 0 where nothing counts."""
    return torch.where(weight_sum > 0, 1 / (width * weight_sum.clamp(min=1e-30)), 0)


def scaled_gradients(
    upstream: Tensor,
    factor: Tensor,
    dfeatures: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    features: Tensor,
    weight: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients times upstream and factor, in the dtype of the features.

    Features and weight are named so that a second derivative is refused and not taken for zero.
    """
    if IMPLS[backend] is native_impl:
        found = native_impl.scaled_gradients(upstream, factor, dfeatures, dweight, dbias, features)
        if found is not None:
            return found
    dtype, g = features.dtype, upstream * factor
    return scaled(dfeatures, g, dtype), scaled(dweight, g, dtype), scaled(dbias, g, dtype)


weighted_loss = torch.library.custom_op(
    "deepfusion::fused_linear_mse", loss_and_gradients, mutates_args=()
)
_scaled = torch.library.custom_op(
    "deepfusion::fused_linear_mse_backward", scaled_gradients, mutates_args=()
)


@weighted_loss.register_fake
def _(
    features_ND: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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


@_scaled.register_fake
def _(
    upstream: Tensor,
    factor: Tensor,
    dfeatures: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    features: Tensor,
    weight: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(dfeatures),
        torch.empty_like(dweight, dtype=features.dtype),
        torch.empty_like(dbias, dtype=features.dtype),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *inputs[:2])
    ctx.backend = inputs[13]


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 14
    gradients = _scaled(upstream, *ctx.saved_tensors, ctx.backend)
    return (*where_wanted(gradients, ctx.needs_input_grad[:3]), *(None,) * 11)


weighted_loss.register_autograd(_backward, setup_context=_keep)


class _Plain(torch.autograd.Function):
    """The same node without the opaque op."""

    @staticmethod
    def forward(ctx: Any, rest: tuple[Any, ...], *inputs: Any) -> Tensor:
        loss, *kept = loss_and_gradients(*inputs, *rest)
        ctx.save_for_backward(*kept, *inputs[:2])
        ctx.backend = rest[-1]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        given: tuple[Any, ...] = (upstream, *ctx.saved_tensors, ctx.backend)
        return (None, *where_wanted(scaled_gradients(*given), ctx.needs_input_grad[1:4]))


def loss_of_rows(
    features_ND: Tensor, weight: Tensor, bias: Tensor | None, target_BLM: Tensor, *rest: Any
) -> Tensor:
    """The loss of `loss_and_gradients`: through the opaque op wherever somebody looks on."""
    loss: Tensor
    if is_watched((features_ND, weight, bias, target_BLM)):
        loss = weighted_loss(features_ND, weight, bias, target_BLM, *rest)[0]
    else:
        loss = _Plain.apply((target_BLM, *rest), features_ND, weight, bias)  # type: ignore[no-untyped-call]
    return loss
