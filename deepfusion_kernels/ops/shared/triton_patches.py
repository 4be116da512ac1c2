"""Triton device functions on patches of tokens, and on tensors that a launch takes as a tuple.

mean_i = sum of m_t x_t over the tokens t of patch i / max(n_i, 1)      n_i = sum of m_t
"""

from __future__ import annotations

from ..._triton import tl, triton


@triton.jit
def pick(options, index, COUNT: tl.constexpr):
    """options[index] for an index that the device alone knows: a chain of selects."""
    found = options[0]
    for k in tl.static_range(1, COUNT):
        found = tl.where(index == k, options[k], found)
    return found


@triton.jit
def tokens_kept(mask_ptr, t, t_ok):
    """Of the tokens t_ok those that the mask of the sample has set; no mask keeps them all."""
    kept = t_ok
    if mask_ptr is not None:
        kept = t_ok & (tl.load(mask_ptr + t, mask=t_ok, other=0) != 0)
    return kept


@triton.jit
def patch_mean(
    token_ptr, stride_t, mask_ptr, start, stop, c, c_ok,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean of columns c over the kept tokens of [start, stop), float32; 0 where none is kept."""
    total = tl.zeros([BLOCK_C], tl.float32)
    count = 0
    for first in range(start, stop, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        kept = tokens_kept(mask_ptr, t, t < stop)
        at = token_ptr + t.to(tl.int64)[:, None] * stride_t + c[None, :]
        x = tl.load(at, mask=kept[:, None] & c_ok[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
        count += tl.sum(kept.to(tl.int32), 0)
    return total / tl.maximum(count, 1).to(tl.float32)
