"""Triton kernels of the attention by tiles: scores of one tile at a time, exponents in base 2.

S = s Q K^T    top' = max(top, max S)    f = 2^(top - top')    l = l f + sum 2^(S - top')
acc = acc f + 2^(S - top') V             Y = acc / l           L = (top + log2 l) ln 2
A = 2^(S - L log2 e)                     no key: Y = 0, L = +inf, so that A is 0 in backward too

A tile lies in one stage, so that causal tiles past the diagonal are skipped in every stage. Each
tile of a gradient has one owner that sums in order: the same bits every time.
"""

from __future__ import annotations

from ..._triton import tl, triton
from .triton_small import LN2, LOG2E, seen_keys


@triton.jit
def _flash_forward_kernel(
    qkv_ptr, valid_ptr, y_ptr, lse_ptr, sizes, scale, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sizes = (stages, batch, patches, heads); scale holds log2(e)."""
    S, B, Q, H = sizes
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    tiles = tl.cdiv(Q, BLOCK_M)
    j = tl.program_id(0) // tiles
    # the last tile of a causal stage has most to do: it goes first
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    pitch = 3 * H * E
    i, e = first + tl.arange(0, BLOCK_M), tl.arange(0, E)
    head_ptr = qkv_ptr + h * E
    row = (j * B + b).to(tl.int64) * Q
    at = head_ptr + row * pitch + i[:, None] * pitch + e[None, :]
    q = tl.load(at, mask=(i < Q)[:, None], other=0.0)
    sample_valid = None if valid_ptr is None else valid_ptr + b * Q
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, E], tl.float32)
    stop = tl.minimum(first + BLOCK_M, Q) if CAUSAL else Q
    tiles = tl.cdiv(stop, BLOCK_N)
    for step in range(S * tiles):
        key = step % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        base = head_ptr + (step // tiles * B + b).to(tl.int64) * Q * pitch
        k_at = base + H * E + key[None, :] * pitch + e[:, None]
        k = tl.load(k_at, mask=(key < Q)[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if MASKED:
            seen = seen_keys(sample_valid, i[:, None], key[None, :], Q, CAUSAL)
            scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # NOTE: while no key is seen, inf - inf would be NaN
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        norm = norm * fade + tl.sum(weights, 1)
        v_at = base + 2 * H * E + key[:, None] * pitch + e[None, :]
        v = tl.load(v_at, mask=(key < Q)[:, None], other=0.0)
        total = tl.dot(weights.to(v.dtype), v, total * fade[:, None], input_precision="ieee")
        top = higher
    blind = norm == 0.0
    norm = tl.where(blind, 1.0, norm)
    y = total / norm[:, None]
    at = y_ptr + (row + i)[:, None] * H * E + h * E + e[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(i < Q)[:, None])
    lse = tl.where(blind, float("inf"), (top + tl.log2(norm)) * LN2)
    at = lse_ptr + (tl.program_id(1).to(tl.int64) * S + j) * Q + i
    tl.store(at, lse, mask=i < Q)


@triton.jit
def _flash_dkv_kernel(
    qkv_ptr, valid_ptr, dy_ptr, lse_ptr, delta_ptr, upstream_ptr, dqkv_ptr, sizes, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of keys stays, the queries that see it pass: dK and dV."""
    S, B, Q, H = sizes
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    tiles = tl.cdiv(Q, BLOCK_N)
    first = tl.program_id(0) % tiles * BLOCK_N
    width, pitch = H * E, 3 * H * E
    key, e = first + tl.arange(0, BLOCK_N), tl.arange(0, E)
    key_ok = (key < Q)[:, None]
    row = (tl.program_id(0) // tiles * B + b).to(tl.int64) * Q
    inside = (row + key)[:, None] * pitch + h * E + e[None, :]
    k = tl.load(qkv_ptr + inside + width, mask=key_ok, other=0.0)
    v = tl.load(qkv_ptr + inside + 2 * width, mask=key_ok, other=0.0)
    sample_valid = None if valid_ptr is None else valid_ptr + b * Q
    dk = tl.zeros([BLOCK_N, E], tl.float32)
    dv = tl.zeros([BLOCK_N, E], tl.float32)
    skipped = first // BLOCK_M if CAUSAL else 0
    tiles = tl.cdiv(Q, BLOCK_M) - skipped
    for step in range(S * tiles):
        i = (skipped + step % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        i_ok = i < Q
        stage = step // tiles
        rows = ((stage * B + b).to(tl.int64) * Q + i)[:, None]
        q_at = qkv_ptr + rows * pitch + h * E + e[None, :]
        q = tl.load(q_at, mask=i_ok[:, None], other=0.0)
        dy_at = dy_ptr + rows * width + h * E + e[None, :]
        dy = tl.load(dy_at, mask=i_ok[:, None], other=0.0)
        stats = (tl.program_id(1).to(tl.int64) * S + stage) * Q + i
        lse = tl.load(lse_ptr + stats, mask=i_ok, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + stats, mask=i_ok, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        weights = tl.exp2(scores - lse[None, :])
        if MASKED:
            seen = seen_keys(sample_valid, i[None, :], key[:, None], Q, CAUSAL)
            weights = tl.where(seen, weights, 0.0)
        dv = tl.dot(weights.to(dy.dtype), dy, dv, input_precision="ieee")
        dweights = tl.dot(v, tl.trans(dy), input_precision="ieee")
        dscores = weights * (dweights - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    upstream = tl.load(upstream_ptr)
    element = dqkv_ptr.dtype.element_ty
    dk = dk * (scale * LN2 * upstream)
    tl.store(dqkv_ptr + inside + width, dk.to(element), mask=key_ok)
    tl.store(dqkv_ptr + inside + 2 * width, (dv * upstream).to(element), mask=key_ok)


@triton.jit
def _flash_dq_kernel(
    qkv_ptr, valid_ptr, dy_ptr, lse_ptr, delta_ptr, upstream_ptr, dqkv_ptr, sizes, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of queries stays, the keys that it sees pass: dQ."""
    S, B, Q, H = sizes
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    tiles = tl.cdiv(Q, BLOCK_M)
    j = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    width, pitch = H * E, 3 * H * E
    i, e = first + tl.arange(0, BLOCK_M), tl.arange(0, E)
    i_ok = i < Q
    rows = ((j * B + b).to(tl.int64) * Q + i)[:, None]
    inside = rows * pitch + h * E + e[None, :]
    q = tl.load(qkv_ptr + inside, mask=i_ok[:, None], other=0.0)
    dy = tl.load(dy_ptr + rows * width + h * E + e[None, :], mask=i_ok[:, None], other=0.0)
    stats = (tl.program_id(1).to(tl.int64) * S + j) * Q + i
    lse = tl.load(lse_ptr + stats, mask=i_ok, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + stats, mask=i_ok, other=0.0)
    sample_valid = None if valid_ptr is None else valid_ptr + b * Q
    dq = tl.zeros([BLOCK_M, E], tl.float32)
    stop = tl.minimum(first + BLOCK_M, Q) if CAUSAL else Q
    tiles = tl.cdiv(stop, BLOCK_N)
    for step in range(S * tiles):
        key = step % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        base = qkv_ptr + (step // tiles * B + b).to(tl.int64) * Q * pitch + h * E
        at = base + key[:, None] * pitch + e[None, :]
        k = tl.load(at + width, mask=(key < Q)[:, None], other=0.0)
        v = tl.load(at + 2 * width, mask=(key < Q)[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        weights = tl.exp2(scores - lse[:, None])
        if MASKED:
            seen = seen_keys(sample_valid, i[:, None], key[None, :], Q, CAUSAL)
            weights = tl.where(seen, weights, 0.0)
        dweights = tl.dot(dy, tl.trans(v), input_precision="ieee")
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    dq = dq * (scale * LN2 * tl.load(upstream_ptr))
    tl.store(dqkv_ptr + inside, dq.to(dqkv_ptr.dtype.element_ty), mask=i_ok[:, None])
