"""Triton kernels of the patch projection, all stages in one launch; `stages` is a tuple.

pool      mean of every patch, one program a patch and block of columns
project   X_j = rows_j W_j^T + c_j + pos + st_j       rows_j: p tokens side by side, or the mean
dweight   dW_j = dX_j^T rows_j
dstage    dF_j = dX_j W_j, stored at the tokens' places: m at its slot, or m / n all over the patch

A tile lies in one slot of the patch, so that its columns are neighbours in a token: row (b, i),
slot k -> token i p + k. The mask and the ragged tail are conditions of a load or a store.
"""

from __future__ import annotations

from ..._triton import tl, triton
from ..shared.triton_patches import patch_mean, pick, tokens_kept


@triton.jit
def _pool_kernel(
    stages, strides_b, strides_t, offsets_ptr, mask_ptr, out_ptr, sizes, COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [stage, row, column] = means; sizes = (rows, patches, tokens, columns)."""
    N, Q, L, C = sizes
    n, j = tl.program_id(0).to(tl.int64), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = n // Q
    cut = offsets_ptr + b * (Q + 1) + n % Q
    tokens = pick(stages, j, COUNT) + b * pick(strides_b, j, COUNT)
    sample_mask = None if mask_ptr is None else mask_ptr + b * L
    mean = patch_mean(
        tokens, pick(strides_t, j, COUNT), sample_mask, tl.load(cut), tl.load(cut + 1), c, c < C,
        BLOCK_T, BLOCK_C,
    )  # fmt: skip
    at = out_ptr + (j.to(tl.int64) * N + n) * C + c
    tl.store(at, mean.to(out_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _project_kernel(
    stages, strides_b, strides_t, mask_ptr, weight_ptr, bias_ptr, patch_ptr, stage_ptr, out_ptr,
    sizes, COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sizes = (rows, patches, tokens, columns of a token, slots, D)."""
    N, Q, L, C, slots, D = sizes
    j = tl.program_id(1)
    across = tl.cdiv(D, BLOCK_D)
    n = tl.program_id(0) // across * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(0) % across * BLOCK_D + tl.arange(0, BLOCK_D)
    n_ok, d_ok = n < N, d < D
    b, i = n // Q, n % Q
    stride_t = pick(strides_t, j, COUNT)
    row_ptr = pick(stages, j, COUNT) + b.to(tl.int64) * pick(strides_b, j, COUNT)
    weights = weight_ptr + (j.to(tl.int64) * D + d) * slots * C
    blocks = tl.cdiv(C, BLOCK_C)
    # what is added comes first: at the end it would compete with the sums for registers
    shift = tl.load(bias_ptr + j * D + d, mask=d_ok, other=0.0).to(tl.float32)
    if stage_ptr is not None:
        shift += tl.load(stage_ptr + j * D + d, mask=d_ok, other=0.0).to(tl.float32)
    both = n_ok[:, None] & d_ok[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32) + shift[None, :]
    if patch_ptr is not None:
        positions = patch_ptr + i[:, None] * D + d[None, :]
        total += tl.load(positions, mask=both, other=0.0).to(tl.float32)
    for step in range(slots * blocks):
        slot = step // blocks
        c = step % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        c_ok = c < C
        t = i * slots + slot
        kept = n_ok & (t < L)
        if mask_ptr is not None:
            kept = tokens_kept(mask_ptr + b.to(tl.int64) * L, t, kept)
        tokens = row_ptr + t.to(tl.int64) * stride_t
        x = tl.load(tokens[:, None] + c[None, :], mask=kept[:, None] & c_ok[None, :], other=0.0)
        w_at = weights[None, :] + slot * C + c[:, None]
        w = tl.load(w_at, mask=c_ok[:, None] & d_ok[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    at = out_ptr + (j.to(tl.int64) * N + n)[:, None] * D + d[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=both)


@triton.jit
def _dweight_kernel(
    stages, strides_b, strides_t, mask_ptr, dx_ptr, dweight_ptr, sizes, COUNT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of dW_j in one slot sums all rows itself; sizes as in the projection."""
    N, Q, L, C, slots, D = sizes
    j = tl.program_id(1)
    across, blocks = tl.cdiv(D, BLOCK_D), tl.cdiv(C, BLOCK_C)
    d = tl.program_id(0) % across * BLOCK_D + tl.arange(0, BLOCK_D)
    column = tl.program_id(0) // across
    slot = column // blocks
    c = column % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    d_ok, c_ok = d < D, c < C
    stride_b, stride_t = pick(strides_b, j, COUNT), pick(strides_t, j, COUNT)
    stage = pick(stages, j, COUNT)
    gradient = dx_ptr + j.to(tl.int64) * N * D
    total = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        b, t = n // Q, n % Q * slots + slot
        kept = (n < N) & (t < L)
        if mask_ptr is not None:
            kept = tokens_kept(mask_ptr + b.to(tl.int64) * L, t, kept)
        at = stage + b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t
        x = tl.load(at[:, None] + c[None, :], mask=kept[:, None] & c_ok[None, :], other=0.0)
        at = gradient + n.to(tl.int64)[None, :] * D + d[:, None]
        dx = tl.load(at, mask=(n < N)[None, :] & d_ok[:, None], other=0.0)
        total = tl.dot(dx, x, total, input_precision="ieee")
    at = dweight_ptr + (j.to(tl.int64) * D + d)[:, None] * slots * C + slot * C + c[None, :]
    tl.store(at, total.to(dweight_ptr.dtype.element_ty), mask=d_ok[:, None] & c_ok[None, :])


@triton.jit
def _dstage_kernel(
    dstages, numbers, offsets_ptr, mask_ptr, dx_ptr, weight_ptr, sizes, COUNT: tl.constexpr,
    POOL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dstages: contiguous, the wanted ones alone; numbers: which stages they are."""
    N, Q, L, C, slots, D = sizes
    wanted = tl.program_id(1)
    # a lone number 1 is a constant of the launch: the sum makes it a value of the device again
    j = pick(numbers, wanted, COUNT) + wanted.to(tl.int64) * 0
    blocks = tl.cdiv(C, BLOCK_C)
    column = tl.program_id(0) % (slots * blocks)
    n = tl.program_id(0) // (slots * blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = column // blocks
    c = column % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n_ok, c_ok = n < N, c < C
    gradient = dx_ptr + (j * N + n)[:, None] * D
    weights = weight_ptr + j * D * slots * C + slot * C + c[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        d_ok = d < D
        dx = tl.load(gradient + d[None, :], mask=n_ok[:, None] & d_ok[None, :], other=0.0)
        at = weights + d.to(tl.int64)[:, None] * slots * C
        w = tl.load(at, mask=d_ok[:, None] & c_ok[None, :], other=0.0)
        total = tl.dot(dx, w, total, input_precision="ieee")
    b, i = (n // Q).to(tl.int64), n % Q
    out = pick(dstages, wanted, COUNT)
    element = out.dtype.element_ty
    if not POOL:
        t = i * slots + slot
        here = n_ok & (t < L)
        kept = here
        if mask_ptr is not None:
            kept = tokens_kept(mask_ptr + b * L, t, here)
        value = tl.where(kept[:, None], total, 0.0).to(element)
        at = out + (b * L + t)[:, None] * C + c[None, :]
        tl.store(at, value, mask=here[:, None] & c_ok[None, :])
    else:
        cut = offsets_ptr + b * (Q + 1) + i
        start = tl.load(cut, mask=n_ok, other=0)
        stop = tl.load(cut + 1, mask=n_ok, other=0)
        count = stop - start
        sample_mask = None
        if mask_ptr is not None:
            sample_mask = mask_ptr + b * L
            count = tl.zeros([BLOCK_N], tl.int32)
            for k in range(tl.max(stop - start, 0)):
                count += tokens_kept(sample_mask, start + k, start + k < stop).to(tl.int32)
        total = total / tl.maximum(count, 1).to(tl.float32)[:, None]
        # the first and the last patch of a sample also clear the tokens outside every patch
        low = tl.where(i == 0, 0, start)
        high = tl.where(n_ok, tl.where(i == Q - 1, L, stop), low)
        for k in range(tl.max(high - low, 0)):
            t = low + k
            here = t < high
            kept = tokens_kept(sample_mask, t, here & (t >= start) & (t < stop))
            value = tl.where(kept[:, None], total, 0.0).to(element)
            at = out + (b * L + t)[:, None] * C + c[None, :]
            tl.store(at, value, mask=here[:, None] & c_ok[None, :])
