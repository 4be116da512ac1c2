"""Self-attention over all stages and patches, masked by patch.

S = s Q K^T where the key's patch is valid (and not later, if causal), else -inf   s = (D / H)^-1/2
A = softmax S       Y = A V       no residual, no norm, no output projection
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backends
from ...checks import expect, expect_that
from ..shared import patches
from ..shared.gemm import product
from ..shared.gradients import where_wanted
from ..shared.watched import is_watched
from . import native_cuda, native_impl, reference, triton_impl

DOORS = ("multi_stage_attention",)
IMPLS = {
    "reference": reference,
    "cpu": native_impl,
    "cuda": native_cuda,
    "triton": triton_impl,
}
OP = "multi_stage_attention"


def multi_stage_attention(
    features: Tensor,
    qkv_weight: Tensor,
    *,
    num_heads: int,
    qkv_bias: Tensor | None = None,
    causal: bool = False,
    patch_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(s Q K^T) V over the S Q patches of a sample; Q, K, V = X Wq^T, X Wk^T, X Wv^T.

    features [B, S, Q, D], qkv_weight [3 D, D] (Wq, Wk, Wv), qkv_bias [3 D], patch_mask [B, Q]
    bool, shared by the stages: a masked patch is no key. causal: patch i sees patches <= i of every
    stage. -> Y [B, S, Q, D], stage-major in memory; 0 for a query that sees no key.
    Raises ValueError for shapes, dtypes, devices, D % num_heads. Source: arXiv 2602.14301, eq. 8.
    """
    B, S, Q, D = expect(features, OP, "features", "B S Q D")
    check_weights(features, qkv_weight, qkv_bias, num_heads, OP)
    expect_that(S >= 1, OP, "features", "[B, S, Q, D] with S >= 1", S)
    if patch_mask is not None:
        expect(patch_mask, OP, "patch_mask", "B Q", B=B, Q=Q, dtype=torch.bool, like=features)
    inputs = (features.transpose(0, 1), qkv_weight, qkv_bias, patch_mask)
    options = (
        num_heads,
        causal,
        default_scale(D, num_heads) if scale is None else scale,
        backends.choose(backend, features, IMPLS, head_size=D // num_heads),
    )
    y_SBQD: Tensor
    if is_watched(inputs):
        y_SBQD = _attention(*inputs, *options)[0]
    else:
        y_SBQD = _Plain.apply(options, *inputs)  # type: ignore[no-untyped-call]
    return y_SBQD.transpose(0, 1)


def default_scale(width: int, num_heads: int) -> float:
    return float((width // num_heads) ** -0.5)


def check_weights(
    features: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int, op: str
) -> None:
    """Raises ValueError unless the projection fits the features' last axis and the heads."""
    D = features.shape[-1]
    expect_that(
        num_heads >= 1 and D % num_heads == 0, op, "num_heads", f"a divisor of {D}", num_heads
    )
    expect(
        weight,
        op,
        "qkv_weight",
        "3D D",
        dtype=features.dtype,
        like=features,
        **{"3D": 3 * D, "D": D},
    )
    if bias is not None:
        expect(bias, op, "qkv_bias", "3D", dtype=features.dtype, like=features, **{"3D": 3 * D})


def row_delta(y_SBQD: Tensor, dy_SBQD: Tensor, num_heads: int, backend: str) -> Tensor:
    """rowsum(dY * Y) of every head, [B, H, P] in float32 (float64 for float64)."""
    if IMPLS[backend] is native_impl:
        return native_impl.row_delta(y_SBQD, dy_SBQD, num_heads)
    S, B, Q, D = y_SBQD.shape
    wide = patches.wide_dtype(y_SBQD.dtype)
    products = y_SBQD.to(wide) * dy_SBQD
    delta_SBQH = products.view(S, B, Q, num_heads, D // num_heads).sum(-1)
    return delta_SBQH.permute(1, 3, 0, 2).reshape(B, num_heads, S * Q)


def projection_backward(
    dqkv: Tensor, x_SBQD: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """dX and dWqkv from dQKV; what is not needed is an empty tensor."""
    rows, x_ND = dqkv.flatten(0, 2), x_SBQD.flatten(0, 2)
    dx = x_ND.new_empty(x_SBQD.shape if needs_x else (0,))
    dweight = weight.new_empty(weight.shape if needs_weight else (0,))
    if needs_x:
        product(rows, weight, dx.flatten(0, 2))
    if needs_weight:
        product(rows.t(), x_ND, dweight)
    return dx, dweight


def attend(
    features_SBQD: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    valid_BQ: Tensor | None,
    num_heads: int,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y, QKV and L."""
    y_SBQD, qkv, lse_BHP = IMPLS[backend].attention_forward(
        features_SBQD, qkv_weight, qkv_bias, valid_BQ, num_heads, causal, scale
    )
    return y_SBQD, qkv, lse_BHP


_attention = torch.library.custom_op("deepfusion::multi_stage_attention", attend, mutates_args=())


@_attention.register_fake
def _(
    features_SBQD: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    valid_BQ: Tensor | None,
    num_heads: int,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    S, B, Q, D = features_SBQD.shape
    return (
        features_SBQD.new_empty(S, B, Q, D),
        features_SBQD.new_empty(S, B, Q, 3 * D),
        features_SBQD.new_empty(B, num_heads, S * Q, dtype=patches.wide_dtype(features_SBQD.dtype)),
    )


def attention_gradients(
    dy_SBQD: Tensor,
    y_SBQD: Tensor,
    features_SBQD: Tensor,
    qkv_weight: Tensor,
    qkv: Tensor,
    lse_BHP: Tensor,
    valid_BQ: Tensor | None,
    num_heads: int,
    causal: bool,
    scale: float,
    needs_features: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dfeatures, dqkv_weight, dqkv_bias; what is not needed is an empty tensor."""
    if IMPLS[backend] is native_impl:
        found = native_impl.attention_gradients(
            dy_SBQD, y_SBQD, features_SBQD, qkv_weight, qkv, lse_BHP, valid_BQ, num_heads, causal,
            scale, needs_features, needs_weight, needs_bias,
        )  # fmt: skip
        if found is not None:
            return found
    delta_BHP = row_delta(y_SBQD, dy_SBQD, num_heads, backend)
    dqkv = IMPLS[backend].attention_backward(
        qkv, lse_BHP, dy_SBQD, delta_BHP, valid_BQ, num_heads, causal, scale,
        lse_BHP.new_ones(()),
    )  # fmt: skip
    dx, dweight = projection_backward(dqkv, features_SBQD, qkv_weight, needs_features, needs_weight)
    dbias = qkv.new_empty(0)
    if needs_bias:
        dbias = dqkv.flatten(0, 2).sum(0, dtype=lse_BHP.dtype).to(qkv.dtype)
    return dx, dweight, dbias


_attention_backward = torch.library.custom_op(
    "deepfusion::multi_stage_attention_backward", attention_gradients, mutates_args=()
)


@_attention_backward.register_fake
def _(
    dy_SBQD: Tensor,
    y_SBQD: Tensor,
    features_SBQD: Tensor,
    qkv_weight: Tensor,
    qkv: Tensor,
    lse_BHP: Tensor,
    valid_BQ: Tensor | None,
    num_heads: int,
    causal: bool,
    scale: float,
    needs_features: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        y_SBQD.new_empty(y_SBQD.shape if needs_features else (0,)),
        qkv_weight.new_empty(qkv_weight.shape if needs_weight else (0,)),
        qkv.new_empty(qkv.shape[3:] if needs_bias else (0,)),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, weight, _, valid_BQ, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[0], features, weight, *output[1:], valid_BQ)
    ctx.options = options


def _backward(ctx: Any, dy_SBQD: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy_SBQD is None:
        return (None,) * 8
    *options, backend = ctx.options
    wanted = ctx.needs_input_grad[:3]
    gradients = _attention_backward(dy_SBQD, *ctx.saved_tensors, *options, *wanted, backend)
    return (*where_wanted(gradients, wanted), *(None,) * 5)


_attention.register_autograd(_backward, setup_context=_keep)


class _Plain(torch.autograd.Function):
    """The same node without the opaque op."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], *inputs: Any) -> Tensor:
        features, weight, bias, valid_BQ = inputs
        y, qkv, lse = attend(features, weight, bias, valid_BQ, *options)
        ctx.save_for_backward(y, features, weight, qkv, lse, valid_BQ)
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SBQD: Tensor) -> tuple[Tensor | None, ...]:
        *options, backend = ctx.options
        wanted = ctx.needs_input_grad[1:4]
        given: tuple[Any, ...] = (dy_SBQD, *ctx.saved_tensors, *options, *wanted, backend)
        return (None, *where_wanted(attention_gradients(*given), wanted), None)
