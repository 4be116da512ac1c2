"""Launches of the attention: a head of a sample whole on chip up to 128 patches, else by tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._triton import triton
from .triton_flash import _flash_dkv_kernel, _flash_dq_kernel, _flash_forward_kernel
from .triton_small import _small_backward_kernel, _small_forward_kernel

# by bytes of an element: float32 has no tensor cores here, and its operands wait in registers
SMALL_PATCHES, SMALL_HEAD = {2: 128, 4: 32}, 64
SMALL_COLUMNS = 32


def small_block(patches: int) -> int:
    return max(16, int(triton.next_power_of_2(patches)))


def is_small(patches: int, head_size: int, itemsize: int) -> bool:
    return patches <= SMALL_PATCHES[itemsize] and head_size <= SMALL_HEAD


def small_launch(patches: int, itemsize: int) -> Mapping[str, int]:
    """Warps by the scores that they hold: not measured; what compiles without spills."""
    warps = 8 if patches > 32 or itemsize == 4 else 4
    return {"num_warps": warps, "num_stages": 2, "maxnreg": 255}


def small_queries(patches: int) -> int:
    """Queries of one pass of the backward kernel: with all keys, what the registers hold."""
    return 16 if patches > 64 else min(32, small_block(patches))


def flash_launch(kernel: str, head_size: int, itemsize: int) -> Mapping[str, int]:
    """Tiles of queries and keys by kernel: not measured; what compiles without spills."""
    launch = {"E": head_size, "num_stages": 2, "maxnreg": 255}
    if itemsize == 4:
        warps, limit = (16, 128) if head_size == 128 else (8, 255)
        tile = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": warps, "num_stages": 1, "maxnreg": limit}
    elif head_size == 128:
        tile = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4}
        if kernel == "dkv":
            tile = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8}
    elif kernel == "dkv":
        tile = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8}
    else:
        tile = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8}
    return launch | tile


def _options(patches: int, causal: bool, valid: Tensor | None, launch: Mapping[str, int]) -> Any:
    ragged = patches % launch["BLOCK_N"] != 0
    return {**launch, "CAUSAL": causal, "MASKED": causal or ragged or valid is not None}


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
    S, B, Q, D = features_SBQD.shape
    x, E, P = features_SBQD, D // num_heads, S * Q
    y = x.new_empty(S, B, Q, D)
    lse_BHP = x.new_empty(B, num_heads, P, dtype=torch.float32)
    valid_BQ = None if valid_BQ is None else valid_BQ.contiguous()
    sizes, scale2 = (S, B, Q, num_heads), scale * math.log2(math.e)
    if y.numel() == 0:
        return y, x.new_empty(S, B, Q, 3 * D), lse_BHP
    with torch.cuda.device_of(y):
        if is_small(P, E, x.itemsize):
            x = x if x.stride(3) == 1 else x.contiguous()
            qkv = x.new_empty(S, B, Q, 3 * D)
            bias = None if qkv_bias is None else qkv_bias.contiguous()
            _small_forward_kernel[(B * num_heads,)](
                (x, *x.stride()[:3]), qkv_weight.contiguous(), bias, valid_BQ, qkv, y, lse_BHP,
                sizes, scale2, CAUSAL=causal, E=E, BLOCK_P=small_block(P),
                BLOCK_C=min(SMALL_COLUMNS, small_block(D)), **small_launch(P, x.itemsize),
            )  # fmt: skip
            return y, qkv, lse_BHP
        qkv = F.linear(x, qkv_weight, qkv_bias).contiguous()
        launch = flash_launch("forward", E, x.itemsize)
        grid = (S * triton.cdiv(Q, launch["BLOCK_M"]), B * num_heads)
        _flash_forward_kernel[grid](
            qkv, valid_BQ, y, lse_BHP, sizes, scale2, **_options(Q, causal, valid_BQ, launch)
        )
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
    dqkv = torch.empty_like(qkv)
    if dqkv.numel() == 0:
        return dqkv
    (S, B, Q, D), P = dy_SBQD.shape, lse_BHP.shape[2]
    E = D // num_heads
    valid_BQ = None if valid_BQ is None else valid_BQ.contiguous()
    inputs = (
        qkv, valid_BQ, dy_SBQD.contiguous(), lse_BHP, delta_BHP.contiguous(),
        upstream.to(torch.float32), dqkv, (S, B, Q, num_heads), scale * math.log2(math.e),
    )  # fmt: skip
    with torch.cuda.device_of(qkv):
        if is_small(P, E, qkv.itemsize):
            _small_backward_kernel[(B * num_heads,)](
                *inputs,
                CAUSAL=causal,
                E=E,
                BLOCK_P=small_block(P),
                BLOCK_M=small_queries(P),
                **small_launch(P, qkv.itemsize),
            )
            return dqkv
        for name, kernel in (("dkv", _flash_dkv_kernel), ("dq", _flash_dq_kernel)):
            launch = flash_launch(name, E, qkv.itemsize)
            fixed = launch["BLOCK_N" if name == "dkv" else "BLOCK_M"]
            grid = (S * triton.cdiv(Q, fixed), B * num_heads)
            kernel[grid](*inputs, **_options(Q, causal, valid_BQ, launch))
    return dqkv
