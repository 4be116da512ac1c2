"""Triton kernels of the attention of few patches: one program holds a head of a sample whole.

forward   Q, K, V from X and their rows of the weight, S, softmax, Y: nothing leaves but results
backward  A once, then all five products: dV = A^T dY, dY V^T, dQ = s dS K, dK = s dS^T Q
"""

from __future__ import annotations

from ..._triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def seen_keys(valid_ptr, query, key, Q, CAUSAL: tl.constexpr):
    """Which query sees which key, by their patches; indices that broadcast."""
    seen = key < Q
    if valid_ptr is not None:
        seen = seen & (tl.load(valid_ptr + key, mask=seen, other=0) != 0)
    if CAUSAL:
        seen = seen & (key <= query)
    return seen


@triton.jit
def _small_forward_kernel(
    features, weight_ptr, bias_ptr, valid_ptr, qkv_ptr, y_ptr, lse_ptr, sizes, scale,
    CAUSAL: tl.constexpr, E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """features = (X, strides of stage, sample, patch); scale holds log2(e)."""
    S, B, Q, H = sizes
    x_ptr, stride_s, stride_b, stride_q = features
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    D = H * E
    p, e = tl.arange(0, BLOCK_P), tl.arange(0, E)
    p_ok = p < S * Q
    stage, i = (p // Q).to(tl.int64), p % Q
    x_rows = x_ptr + b.to(tl.int64) * stride_b + stage * stride_s + i * stride_q
    w_rows = weight_ptr + (h * E + e)[None, :] * D
    q = tl.zeros([BLOCK_P, E], tl.float32)
    k = tl.zeros([BLOCK_P, E], tl.float32)
    v = tl.zeros([BLOCK_P, E], tl.float32)
    for first in range(0, D, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        c_ok = (c < D)[:, None]
        x = tl.load(x_rows[:, None] + c[None, :], mask=p_ok[:, None] & (c < D)[None, :], other=0.0)
        w = w_rows + c[:, None]
        q = tl.dot(x, tl.load(w, mask=c_ok, other=0.0), q, input_precision="ieee")
        w += D * D
        k = tl.dot(x, tl.load(w, mask=c_ok, other=0.0), k, input_precision="ieee")
        w += D * D
        v = tl.dot(x, tl.load(w, mask=c_ok, other=0.0), v, input_precision="ieee")
    if bias_ptr is not None:
        q += tl.load(bias_ptr + h * E + e).to(tl.float32)[None, :]
        k += tl.load(bias_ptr + D + h * E + e).to(tl.float32)[None, :]
        v += tl.load(bias_ptr + 2 * D + h * E + e).to(tl.float32)[None, :]
    element = qkv_ptr.dtype.element_ty
    q, k, v = q.to(element), k.to(element), v.to(element)
    rows = ((stage * B + b) * Q + i)[:, None]
    inside = rows * 3 * D + h * E + e[None, :]
    tl.store(qkv_ptr + inside, q, mask=p_ok[:, None])
    tl.store(qkv_ptr + inside + D, k, mask=p_ok[:, None])
    tl.store(qkv_ptr + inside + 2 * D, v, mask=p_ok[:, None])
    sample_valid = None if valid_ptr is None else valid_ptr + b * Q
    seen = seen_keys(sample_valid, i[:, None], i[None, :], Q, CAUSAL) & p_ok[None, :]
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(seen, scores, -float("inf"))
    top = tl.max(scores, 1)
    weights = tl.exp2(scores - tl.where(top == -float("inf"), 0.0, top)[:, None])
    norm = tl.sum(weights, 1)
    blind = norm == 0.0
    norm = tl.where(blind, 1.0, norm)
    y = tl.dot(weights.to(element), v, input_precision="ieee")
    y = y / norm[:, None]
    tl.store(y_ptr + rows * D + h * E + e[None, :], y.to(element), mask=p_ok[:, None])
    lse = tl.where(blind, float("inf"), (top + tl.log2(norm)) * LN2)
    tl.store(lse_ptr + tl.program_id(0).to(tl.int64) * S * Q + p, lse, mask=p_ok)


@triton.jit
def _small_backward_kernel(
    qkv_ptr, valid_ptr, dy_ptr, lse_ptr, delta_ptr, upstream_ptr, dqkv_ptr, sizes, scale,
    CAUSAL: tl.constexpr, E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All keys stay, the queries pass in blocks: what a block sees is all there is to its dQ."""
    S, B, Q, H = sizes
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    P, D = S * Q, H * E
    e = tl.arange(0, E)
    p = tl.arange(0, BLOCK_P)
    p_ok = (p < P)[:, None]
    key_rows = (((p // Q).to(tl.int64) * B + b) * Q + p % Q)[:, None]
    keys = key_rows * 3 * D + D + h * E + e[None, :]
    k = tl.load(qkv_ptr + keys, mask=p_ok, other=0.0)
    v = tl.load(qkv_ptr + keys + D, mask=p_ok, other=0.0)
    sample_valid = None if valid_ptr is None else valid_ptr + b * Q
    upstream = tl.load(upstream_ptr)
    factor = scale * LN2 * upstream
    element = dqkv_ptr.dtype.element_ty
    dk = tl.zeros([BLOCK_P, E], tl.float32)
    dv = tl.zeros([BLOCK_P, E], tl.float32)
    for first in range(0, P, BLOCK_M):
        r = first + tl.arange(0, BLOCK_M)
        r_ok = (r < P)[:, None]
        i = r % Q
        rows = (((r // Q).to(tl.int64) * B + b) * Q + i)[:, None]
        inside = rows * 3 * D + h * E + e[None, :]
        q = tl.load(qkv_ptr + inside, mask=r_ok, other=0.0)
        dy = tl.load(dy_ptr + rows * D + h * E + e[None, :], mask=r_ok, other=0.0)
        stats = tl.program_id(0).to(tl.int64) * P + r
        lse = tl.load(lse_ptr + stats, mask=r < P, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + stats, mask=r < P, other=0.0)
        seen = seen_keys(sample_valid, i[:, None], (p % Q)[None, :], Q, CAUSAL) & (p < P)[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        weights = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
        dv = tl.dot(tl.trans(weights.to(dy.dtype)), dy, dv, input_precision="ieee")
        dweights = tl.dot(dy, tl.trans(v), input_precision="ieee")
        dscores = (weights * (dweights - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(dscores), q, dk, input_precision="ieee")
        dq = tl.dot(dscores, k, input_precision="ieee")
        tl.store(dqkv_ptr + inside, (dq * factor).to(element), mask=r_ok)
    tl.store(dqkv_ptr + keys, (dk * factor).to(element), mask=p_ok)
    tl.store(dqkv_ptr + keys + D, (dv * upstream).to(element), mask=p_ok)
