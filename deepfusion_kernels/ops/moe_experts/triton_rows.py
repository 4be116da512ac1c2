"""Triton kernels of moe_experts without a product: the tile map, gathers and ordered sums.

tile map  row tile m -> its expert and first row, from offsets on the device; -1 where unused
gather    rows[r] = x[order[r] // K]
combine   out_t = sum_k w_tk rows[slots_tk], or without weights; float32, k ascending
dweights  dw_tk = sum of the partial sums of row slots_tk, column tile by column tile
"""

from __future__ import annotations

from ..._triton import tl, triton


@triton.jit
def _tile_map_kernel(
    offsets_ptr, tiles_ptr, E, row_tiles, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """tiles [2, row_tiles]: expert, first row. A program an expert, one more for what is left."""
    expert = tl.program_id(0)
    lanes = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + lanes, mask=lanes < E, other=0)
    end = tl.load(offsets_ptr + lanes + 1, mask=lanes < E, other=0)
    count = (end - begin + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(lanes < expert, count, 0), 0)
    # both are 0 for the program past the experts
    mine = tl.sum(tl.where(lanes == expert, count, 0), 0)
    row = tl.sum(tl.where(lanes == expert, begin, 0), 0)
    mine = tl.where(expert < E, mine, row_tiles - first)
    label = tl.where(expert < E, expert, -1)
    for start in range(0, mine, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = tiles_ptr + first + i
        tl.store(at, tl.zeros([BLOCK], tl.int32) + label, mask=i < mine)
        tl.store(at + row_tiles, row + i * BLOCK_M, mask=i < mine)


@triton.jit
def _gather_kernel(
    x_ptr, order_ptr, rows_ptr, R, width, K, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows that no slot takes stay unwritten: no consumer stores what it makes of them."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    slot = tl.load(order_ptr + r, mask=r < R, other=-1)
    ok = (slot >= 0)[:, None] & (d < width)[None, :]
    token = (slot // K).to(tl.int64)
    x = tl.load(x_ptr + token[:, None] * width + d[None, :], mask=ok)
    tl.store(rows_ptr + r[:, None] * width + d[None, :], x, mask=ok)


@triton.jit
def _combine_kernel(
    rows_ptr, slots_ptr, weights_ptr, out_ptr, T, width, K,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_ok = d < width
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for k in range(K):
        slot = t * K + k
        row = tl.load(slots_ptr + slot, mask=t < T, other=-1).to(tl.int64)
        ok = (row >= 0)[:, None] & d_ok[None, :]
        y = tl.load(rows_ptr + row[:, None] * width + d[None, :], mask=ok, other=0.0)
        y = y.to(tl.float32)
        if weights_ptr is not None:
            # a sentinel's weight may be NaN
            w = tl.load(weights_ptr + slot, mask=row >= 0, other=0.0).to(tl.float32)
            y *= w[:, None]
        total += y
    out = total.to(out_ptr.dtype.element_ty)
    ok = (t < T)[:, None] & d_ok[None, :]
    tl.store(out_ptr + t[:, None] * width + d[None, :], out, mask=ok)


@triton.jit
def _dweights_kernel(partials_ptr, slots_ptr, dweights_ptr, R, parts, BLOCK: tl.constexpr):
    """partials [parts, R] float32."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(slots_ptr + slot, mask=slot < R, other=-1).to(tl.int64)
    at = partials_ptr + row
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        total += tl.load(at, mask=row >= 0, other=0.0)
        at += R
    tl.store(dweights_ptr + slot, total.to(dweights_ptr.dtype.element_ty), mask=slot < R)
