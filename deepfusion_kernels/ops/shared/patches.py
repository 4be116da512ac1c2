"""Patches of tokens: which tokens a patch holds, how many of them count, their mean.

patch i of sample b = tokens [o_bi, o_b,i+1)        n_bi = sum of m_bt over them
mean_bi = sum m_bt x_bt / max(n_bi, 1)
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def even_offsets(batch: int, length: int, patch_size: int, device: torch.device) -> Tensor:
    """[B, Q+1] int32: every patch_size tokens a cut, the last patch short."""
    count = (length + patch_size - 1) // patch_size
    cuts = torch.arange(count + 1, device=device, dtype=torch.int32) * patch_size
    return cuts.clamp(max=length).expand(batch, count + 1)


@functools.lru_cache(maxsize=64)
def kept_offsets(batch: int, length: int, patch_size: int, device: torch.device) -> Tensor:
    """The same, contiguous, made once: five small operations that every step would repeat."""
    # a tensor made in inference mode could not be saved for a later backward
    with torch.inference_mode(False):
        return even_offsets(batch, length, patch_size, device).contiguous()


def checked_offsets(offsets_BQ1: Tensor, length: int, op: str, argument: str) -> Tensor:
    """Offsets within [0, length] that never fall: refused on the CPU, mended on other devices.

    Raises ValueError on the CPU. Elsewhere a check would wait for the device.
    """
    if offsets_BQ1.device.type != "cpu":
        return offsets_BQ1.clamp(0, length).cummax(1).values
    if offsets_BQ1.numel() == 0:
        return offsets_BQ1
    low, high = int(offsets_BQ1.min()), int(offsets_BQ1.max())
    if low < 0 or high > length:
        raise ValueError(f"{op}: {argument} must be in [0, T] = [0, {length}], got [{low}, {high}]")
    if bool((offsets_BQ1.diff(dim=1) < 0).any()):
        raise ValueError(f"{op}: {argument} must be not decreasing along its last axis")
    return offsets_BQ1


def counts(offsets_BQ1: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Valid tokens of every patch, [B, Q] int64."""
    offsets = offsets_BQ1.long()
    if mask_BL is not None:
        before = F.pad(mask_BL.ne(0).cumsum(1), (1, 0))
        offsets = before.gather(1, offsets)
    return offsets.diff(dim=1)


def membership(offsets_BQ1: Tensor, mask_BL: Tensor | None, length: int) -> Tensor:
    """[B, Q, L] bool: token t is valid and lies in patch i."""
    tokens_L = torch.arange(length, device=offsets_BQ1.device)
    inside = (tokens_L >= offsets_BQ1[:, :-1, None]) & (tokens_L < offsets_BQ1[:, 1:, None])
    return inside if mask_BL is None else inside & mask_BL.ne(0)[:, None, :]


def pool_mean(tokens_BLD: Tensor, offsets_BQ1: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Mean over the valid tokens of every patch [B, Q, D]; 0 for a patch without any.

    A patch that holds a NaN or an infinity is NaN; its neighbours are not.
    """
    inside_BQL = membership(offsets_BQ1, mask_BL, tokens_BLD.shape[1])
    # NOTE: 0 * NaN is NaN: such a token must not reach the product, where it would meet every patch
    finite_BL = tokens_BLD.isfinite().all(2)
    tokens_BLD = torch.where(finite_BL[:, :, None], tokens_BLD, 0)
    share_BQL = inside_BQL.to(tokens_BLD.dtype) / inside_BQL.sum(2, keepdim=True).clamp(min=1)
    spoilt_BQ = (inside_BQL & ~finite_BL[:, None, :]).any(2)
    return torch.where(spoilt_BQ[:, :, None], torch.nan, share_BQL @ tokens_BLD)
