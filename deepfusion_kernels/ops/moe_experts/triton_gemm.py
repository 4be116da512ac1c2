"""Triton products over the rows of each expert, in tiles that the tile map names.

up     [g; u] = W1 x of two accumulators, a = act(g) u in the epilogue
rows   y = left W^T or left W: the down projection, and the gradient's way back through W1
dact   dA' = W2^T dO; epilogue: dw partials <dA', a>, dh and a' = w a, with a made anew from h

Persistent: a program takes tile after tile. Rows are found through `order` (GATHER), or lie sorted.
With DESCRIPTORS the weights, and rows that lie sorted, come by TMA.
"""

from __future__ import annotations

from ..._triton import tl, triton
from ..shared.gated_activation import activate, activate_with_slope


@triton.jit
def _place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column tile; GROUP row tiles share a strip of weights while the cache holds it."""
    width = GROUP * column_tiles
    first = tile // width * GROUP
    high = tl.minimum(row_tiles - first, GROUP)
    inside = tile % width
    return first + inside % high, inside // high


@triton.jit
def _row_pointers(left, order_ptr, rows, rows_ok, width, K, GATHER: tl.constexpr):
    """The first column of each row: of its token's, or of its own."""
    if GATHER:
        at = (tl.load(order_ptr + rows, mask=rows_ok, other=0) // K).to(tl.int64)
    else:
        at = rows.to(tl.int64)
    return left + at * width


@triton.jit
def _product(
    left, order_ptr, right, expert, begin, end, n, sizes, BY_ROW: tl.constexpr,
    GATHER: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of left right, float32; sizes = (columns, depth, K).

    right [E, columns, depth] if BY_ROW, else [E, depth, columns].
    """
    N, depth, K = sizes
    rows = begin + tl.arange(0, BLOCK_M)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    rows_ok = (rows < end)[:, None]
    if GATHER or not DESCRIPTORS:
        at = _row_pointers(left, order_ptr, rows, rows < end, depth, K, GATHER)
        left_ptrs = at[:, None] + lanes[None, :]
    if not DESCRIPTORS:
        base = right + expert.to(tl.int64) * N * depth
        if BY_ROW:
            right_ptrs = base + lanes[:, None] + columns.to(tl.int64)[None, :] * depth
        else:
            right_ptrs = base + lanes.to(tl.int64)[:, None] * N + columns[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, depth, BLOCK_K):
        k_ok = k + lanes < depth
        if GATHER or not DESCRIPTORS:
            x = tl.load(left_ptrs, mask=rows_ok & k_ok[None, :], other=0.0)
            left_ptrs += BLOCK_K
        else:
            x = left.load([begin, k])
        if not DESCRIPTORS:
            w = tl.load(right_ptrs, mask=k_ok[:, None] & (columns < N)[None, :], other=0.0)
            right_ptrs += BLOCK_K if BY_ROW else BLOCK_K * N
        elif BY_ROW:
            w = right.load([expert * N + n * BLOCK_N, k]).T
        else:
            w = right.load([expert * depth + k, n * BLOCK_N])
        total = tl.dot(x, w, total, input_precision=PRECISION)
    return total


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right columns of a tile: an epilogue on whole tiles would spill registers."""
    parts = tl.reshape(tile, [BLOCK_M, 2, BLOCK_N // 2])
    return tl.split(tl.permute(parts, [0, 2, 1]))


@triton.jit
def _up_columns(
    gate, up, h_ptr, a_ptr, row, rows_ok, first, F, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    columns = first + tl.arange(0, WIDTH)
    ok = rows_ok[:, None] & (columns < F)[None, :]
    at = h_ptr + row[:, None] * (2 * F) + columns[None, :]
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    tl.store(at, gate.to(dtype), mask=ok)
    tl.store(at + F, up.to(dtype), mask=ok)
    a = (activate(gate, ACTIVATION) * up).to(dtype)
    tl.store(a_ptr + row[:, None] * F + columns[None, :], a, mask=ok)


@triton.jit
def _up_kernel(
    x, w, order_ptr, offsets_ptr, tiles_ptr, h_ptr, a_ptr, sizes, ACTIVATION: tl.constexpr,
    GATHER: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x [T, D] or sorted [R, D], w [E, 2F, D] -> h [R, 2F], a [R, F]; row tiles, F, D, K."""
    row_tiles, F, D, K = sizes
    column_tiles = tl.cdiv(F, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    HALF: tl.constexpr = BLOCK_N // 2
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        m, n = _place(tile, row_tiles, column_tiles, GROUP)
        expert = tl.load(tiles_ptr + m)
        if expert >= 0:
            begin = tl.load(tiles_ptr + row_tiles + m)
            rows = begin + tl.arange(0, BLOCK_M)
            rows_ok = rows < tl.load(offsets_ptr + expert + 1)
            columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
            columns_ok = columns < F
            if GATHER or not DESCRIPTORS:
                at = _row_pointers(x, order_ptr, rows, rows_ok, D, K, GATHER)
                x_ptrs = at[:, None] + lanes[None, :]
            if not DESCRIPTORS:
                line = expert.to(tl.int64) * 2 * F + columns
                w_ptrs = w + lanes[:, None] + line[None, :] * D
                below = tl.cast(F, tl.int64) * D
            gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k in range(0, D, BLOCK_K):
                k_ok = k + lanes < D
                if GATHER or not DESCRIPTORS:
                    xs = tl.load(x_ptrs, mask=rows_ok[:, None] & k_ok[None, :], other=0.0)
                    x_ptrs += BLOCK_K
                else:
                    xs = x.load([begin, k])
                if DESCRIPTORS:
                    of_gate = w.load([expert * 2 * F + n * BLOCK_N, k]).T
                    of_up = w.load([expert * 2 * F + F + n * BLOCK_N, k]).T
                else:
                    ok = k_ok[:, None] & columns_ok[None, :]
                    of_gate = tl.load(w_ptrs, mask=ok, other=0.0)
                    of_up = tl.load(w_ptrs + below, mask=ok, other=0.0)
                    w_ptrs += BLOCK_K
                gate = tl.dot(xs, of_gate, gate, input_precision=PRECISION)
                up = tl.dot(xs, of_up, up, input_precision=PRECISION)
            row = rows.to(tl.int64)
            left_gate, right_gate = _halves(gate, BLOCK_M, BLOCK_N)
            left_up, right_up = _halves(up, BLOCK_M, BLOCK_N)
            _up_columns(
                left_gate, left_up, h_ptr, a_ptr, row, rows_ok, n * BLOCK_N, F, ACTIVATION, HALF
            )
            _up_columns(
                right_gate, right_up, h_ptr, a_ptr, row, rows_ok, n * BLOCK_N + HALF, F, ACTIVATION,
                HALF,
            )  # fmt: skip


@triton.jit
def _rows_kernel(
    left, right, offsets_ptr, tiles_ptr, out_ptr, sizes, BY_ROW: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """left [R, depth] sorted, right of each expert -> out [R, N]; sizes (row tiles, N, depth)."""
    row_tiles, N, depth = sizes
    column_tiles = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        m, n = _place(tile, row_tiles, column_tiles, GROUP)
        expert = tl.load(tiles_ptr + m)
        if expert >= 0:
            begin = tl.load(tiles_ptr + row_tiles + m)
            end = tl.load(offsets_ptr + expert + 1)
            total = _product(
                left, None, right, expert, begin, end, n, (N, depth, 1), BY_ROW, False,
                DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            rows = begin + tl.arange(0, BLOCK_M)
            columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
            at = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
            ok = (rows < end)[:, None] & (columns < N)[None, :]
            tl.store(at, total.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _dact_columns(
    product, h_ptr, out, row, rows_ok, weight, first, F, ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """dh and a' of some columns, out = (dh, a', partials); their part of <dA', a> of each row."""
    dh_ptr, weighted_ptr, _ = out
    columns = first + tl.arange(0, WIDTH)
    ok = rows_ok[:, None] & (columns < F)[None, :]
    at = row[:, None] * (2 * F) + columns[None, :]
    gate = tl.load(h_ptr + at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + at + F, mask=ok, other=0.0).to(tl.float32)
    value, slope = activate_with_slope(gate, ACTIVATION)
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    if weighted_ptr is not None:
        weighted = (weight[:, None] * (value * up)).to(dtype)
        tl.store(weighted_ptr + row[:, None] * F + columns[None, :], weighted, mask=ok)
    if dh_ptr is not None:
        da = weight[:, None] * product
        tl.store(dh_ptr + at, (da * up * slope).to(dtype), mask=ok)
        tl.store(dh_ptr + at + F, (da * value).to(dtype), mask=ok)
    return tl.sum(product * (value * up), 1)


@triton.jit
def _dact_half(
    product, h_ptr, out, row, rows_ok, weight, first, F, ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    left, right = _halves(product, product.shape[0], 2 * WIDTH)
    sums = _dact_columns(left, h_ptr, out, row, rows_ok, weight, first, F, ACTIVATION, WIDTH)
    return sums + _dact_columns(
        right, h_ptr, out, row, rows_ok, weight, first + WIDTH, F, ACTIVATION, WIDTH
    )


@triton.jit
def _dact_kernel(
    dout, w, plan, tiles_ptr, h_ptr, weights_ptr, out, sizes, ACTIVATION: tl.constexpr,
    GATHER: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """plan (order, offsets), out (dh, a', partials [column tiles, R]) or None each, w [E, D, F].

    sizes = (row tiles, F, D, K, R). Where a' alone is wanted nothing is multiplied.
    """
    row_tiles, F, D, K, R = sizes
    order_ptr, offsets_ptr = plan
    dh_ptr, _, partials_ptr = out
    column_tiles = tl.cdiv(F, BLOCK_N)
    HALF: tl.constexpr = BLOCK_N // 2
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        m, n = _place(tile, row_tiles, column_tiles, GROUP)
        expert = tl.load(tiles_ptr + m)
        if expert >= 0:
            begin = tl.load(tiles_ptr + row_tiles + m)
            end = tl.load(offsets_ptr + expert + 1)
            if dh_ptr is not None or partials_ptr is not None:
                product = _product(
                    dout, order_ptr, w, expert, begin, end, n, (F, D, K), False, GATHER,
                    DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            else:
                product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            rows = begin + tl.arange(0, BLOCK_M)
            rows_ok = rows < end
            row = rows.to(tl.int64)
            slot = tl.load(order_ptr + rows, mask=rows_ok, other=0)
            weight = tl.load(weights_ptr + slot, mask=rows_ok, other=0.0).to(tl.float32)
            first = n * BLOCK_N
            left, right = _halves(product, BLOCK_M, BLOCK_N)
            sums = _dact_half(
                left, h_ptr, out, row, rows_ok, weight, first, F, ACTIVATION, HALF // 2
            )
            sums += _dact_half(
                right, h_ptr, out, row, rows_ok, weight, first + HALF, F, ACTIVATION, HALF // 2
            )
            if partials_ptr is not None:
                tl.store(partials_ptr + n.to(tl.int64) * R + row, sums, mask=rows_ok)
