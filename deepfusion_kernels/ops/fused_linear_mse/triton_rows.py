"""Triton kernel between the GEMMs: one program a row of a chunk, in blocks of columns.

R = acc + u - G     sse = sum R^2     E = 2 c R      G = mean of the patch's tokens, perhaps normed
"""

from __future__ import annotations

from ..._triton import tl, triton
from ..shared.triton_patches import patch_mean

NORM_EPS = tl.constexpr(1e-6)


@triton.jit
def _error_kernel(
    products, bias_ptr, target, offsets_ptr, mask_ptr, scale_ptr, sse_ptr, error_ptr, sizes,
    NORM: tl.constexpr, KEEP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """products, error: rows of the chunk, M apart; sizes = (first row, patches, tokens, M).

    KEEP: E takes the products' place too, in float32, for the sum that is the bias's gradient.
    """
    first, Q, L, M = sizes
    row = tl.program_id(0).to(tl.int64)
    n = first + row
    scale = tl.load(scale_ptr + n)
    lanes = tl.arange(0, BLOCK_M)
    if scale == 0.0:
        tl.store(sse_ptr + n, 0.0)
        nothing = tl.zeros([BLOCK_M], tl.float32)
        for begin in range(0, M, BLOCK_M):
            at = row * M + begin + lanes
            if KEEP:
                tl.store(products + at, nothing, mask=begin + lanes < M)
            if error_ptr is not None:
                empty = nothing.to(error_ptr.dtype.element_ty)
                tl.store(error_ptr + at, empty, mask=begin + lanes < M)
        return
    target_ptr, stride_b, stride_t = target
    b = n // Q
    cut = offsets_ptr + b * (Q + 1) + n % Q
    start, stop = tl.load(cut), tl.load(cut + 1)
    sample = target_ptr + b * stride_b
    sample_mask = None if mask_ptr is None else mask_ptr + b * L
    if NORM:
        center, squares = 0.0, 0.0
        for begin in range(0, M, BLOCK_M):
            m = begin + lanes
            m_ok = m < M
            goal = patch_mean(sample, stride_t, sample_mask, start, stop, m, m_ok, BLOCK_T, BLOCK_M)
            # means and squares of two parts join without a second sweep and without cancelling
            count = tl.minimum(M - begin, BLOCK_M).to(tl.float32)
            mean = tl.sum(goal, 0) / count
            off = tl.where(m_ok, goal - mean, 0.0)
            gap, share = mean - center, count / (begin + count)
            squares += tl.sum(off * off, 0) + gap * gap * begin * share
            center += gap * share
        spread = 1.0 / tl.sqrt_rn(squares / M + NORM_EPS)
    total = tl.zeros([BLOCK_M], tl.float32)
    for begin in range(0, M, BLOCK_M):
        m = begin + lanes
        m_ok = m < M
        goal = patch_mean(sample, stride_t, sample_mask, start, stop, m, m_ok, BLOCK_T, BLOCK_M)
        if NORM:
            goal = (goal - center) * spread
        prediction = tl.load(products + row * M + m, mask=m_ok, other=0.0)
        if bias_ptr is not None:
            prediction += tl.load(bias_ptr + m, mask=m_ok, other=0.0).to(tl.float32)
        residual = tl.where(m_ok, prediction - goal, 0.0)
        total += residual * residual
        error = 2.0 * scale * residual
        if KEEP:
            tl.store(products + row * M + m, error, mask=m_ok)
        if error_ptr is not None:
            tl.store(error_ptr + row * M + m, error.to(error_ptr.dtype.element_ty), mask=m_ok)
    tl.store(sse_ptr + n, tl.sum(total, 0))
