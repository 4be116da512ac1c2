"""Triton gradients of the projections: a product over an expert's rows, in their order.

    dW[e] = sum_r left_r right_r^T        dW2: dO_r and w a;  dW1: dh and x_r

A program has a tile of one expert to itself: no split, no atomics, zeros where there are no rows.
"""

from __future__ import annotations

from ..._triton import tl, triton


@triton.jit
def _strip(
    side, order_ptr, start, end, first, width, K, GATHER: tl.constexpr, DESCRIPTORS: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_K rows of a factor, BLOCK of its columns; rows from `end` on are zeros."""
    rows = start + tl.arange(0, BLOCK_K)
    columns = first + tl.arange(0, BLOCK)
    rows_ok = (rows < end)[:, None]
    if DESCRIPTORS and not GATHER:
        values = side.load([start, first])
        # not a zero factor on the other side: the next expert's rows may hold NaN
        if not WHOLE:
            values = tl.where(rows_ok, values, 0.0)
    else:
        if GATHER:
            at = (tl.load(order_ptr + rows, mask=rows < end, other=0) // K).to(tl.int64)
        else:
            at = rows.to(tl.int64)
        ok = (columns < width)[None, :]
        if not WHOLE:
            ok = ok & rows_ok
        values = tl.load(side + at[:, None] * width + columns[None, :], mask=ok, other=0.0)
    return values


@triton.jit
def _dweight_kernel(
    left, right, order_ptr, offsets_ptr, dweight_ptr, sizes, GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """left [R, M], right [R, N] -> dweight [E, M, N]; sizes = (E, M, N, K).

    A factor that is gathered comes by pointers, one that lies sorted by TMA with DESCRIPTORS.
    """
    E, M, N, K = sizes
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = GROUP * column_tiles
    for tile in range(tl.program_id(0), E * row_tiles * column_tiles, tl.num_programs(0)):
        expert = tile // (row_tiles * column_tiles)
        inside = tile % (row_tiles * column_tiles)
        above = inside // group * GROUP
        high = tl.minimum(row_tiles - above, GROUP)
        top = (above + inside % group % high) * BLOCK_M
        side = (inside % group // high) * BLOCK_N
        begin = tl.load(offsets_ptr + expert)
        end = tl.load(offsets_ptr + expert + 1)
        whole = begin + (end - begin) // BLOCK_K * BLOCK_K
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(begin, whole, BLOCK_K):
            a = _strip(
                left, order_ptr, start, end, top, M, K, GATHER_LEFT, DESCRIPTORS, True,
                BLOCK_M, BLOCK_K,
            )  # fmt: skip
            b = _strip(
                right, order_ptr, start, end, side, N, K, GATHER_RIGHT, DESCRIPTORS, True,
                BLOCK_N, BLOCK_K,
            )  # fmt: skip
            total = tl.dot(a.T, b, total, input_precision=PRECISION)
        # a loop of its own: Triton has been wrong about two products of one (triton #10821)
        for start in tl.range(whole, end, BLOCK_K, num_stages=1):
            a = _strip(
                left, order_ptr, start, end, top, M, K, GATHER_LEFT, DESCRIPTORS, False,
                BLOCK_M, BLOCK_K,
            )  # fmt: skip
            b = _strip(
                right, order_ptr, start, end, side, N, K, GATHER_RIGHT, DESCRIPTORS, False,
                BLOCK_N, BLOCK_K,
            )  # fmt: skip
            total = tl.dot(a.T, b, total, input_precision=PRECISION)
        lines = top + tl.arange(0, BLOCK_M)
        columns = side + tl.arange(0, BLOCK_N)
        at = dweight_ptr + (tl.cast(expert, tl.int64) * M + lines)[:, None] * N + columns[None, :]
        ok = (lines < M)[:, None] & (columns < N)[None, :]
        tl.store(at, total.to(dweight_ptr.dtype.element_ty), mask=ok)
