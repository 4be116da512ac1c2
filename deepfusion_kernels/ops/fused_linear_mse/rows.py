"""|R_n|^2 row by row: reduction='none'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shared import patches
from .arguments import OP
from .errors import errors, row_weights
from .loss import weighted_loss


@torch.library.custom_op("deepfusion::fused_linear_mse_rows", mutates_args=())
def squared_errors(
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


@squared_errors.register_fake
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
    options = (False, target_norm, chunk_rows)
    _loss, _factor, *gradients = weighted_loss(*inputs, scale_N, *options, *wanted, backend)
    kept = [
        g.to(inputs[1].dtype) if want else None for g, want in zip(gradients, wanted, strict=True)
    ]
    return (*kept, *(None,) * 7)


squared_errors.register_autograd(_rows_backward, setup_context=_keep_rows)
