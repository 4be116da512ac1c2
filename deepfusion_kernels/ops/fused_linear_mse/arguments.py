"""What `fused_linear_mse` refuses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import INTEGERS, expect, expect_that
from ..shared import patches
from ..shared.watched import is_watched

OP = "fused_linear_mse"
MASKS = (torch.bool, *INTEGERS, torch.uint8)


def check(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    chunk_rows: int | None,
    pooled: bool,
) -> Sequence[int]:
    """The leading sizes of the features; raises ValueError for what does not fit them."""
    M, D = weight.shape
    expect(weight, OP, "weight", "M D", like=features)
    expect(features, OP, "features", "B Q D" if pooled else "... D", D=D, dtype=weight.dtype)
    rows = features.shape[:-1]
    if bias is not None:
        expect(bias, OP, "bias", "M", M=M, dtype=weight.dtype, like=features)
    letters = "B L M" if pooled else "... M"
    sizes = {"B": rows[0], "M": M} if pooled else {"M": M}
    expect(target, OP, "target", letters, dtype=weight.dtype, like=features, **sizes)
    expect_that(not target.requires_grad, OP, "target", "without gradient: detach it", "one")
    if not pooled:
        wanted, got = list(rows), list(target.shape[:-1])
        expect_that(wanted == got, OP, "target", f"[..., M] = {[*wanted, M]}", [*got, M])
    if row_weight is not None:
        expect(row_weight, OP, "row_weight", "...", like=features)
        wanted, got = list(rows), list(row_weight.shape)
        expect_that(wanted == got, OP, "row_weight", f"[...] = {wanted}", got)
        expect_that(not row_weight.requires_grad, OP, "row_weight", "without gradient", "one")
    if chunk_rows is not None:
        expect_that(chunk_rows >= 1, OP, "chunk_rows", ">= 1", chunk_rows)
    return rows


def check_patches(
    rows: Sequence[int],
    target: Tensor,
    patch_size: int | None,
    offsets: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """The offsets [B, Q+1] of a pooled call."""
    (B, Q), L = rows, target.shape[1]
    if mask is not None:
        expect(mask, OP, "target_mask", "B L", B=B, L=L, dtype=MASKS, like=target)
    if offsets is not None:
        expect_that(patch_size is None, OP, "patch_size", "None beside target_offsets", patch_size)
        expect(
            offsets, OP, "target_offsets", "B Q+1", dtype=torch.int32, like=target,
            **{"B": B, "Q+1": Q + 1},
        )  # fmt: skip
        return offsets
    assert patch_size is not None, "called with neither patch_size nor offsets"
    expect_that(patch_size >= 1, OP, "patch_size", ">= 1", patch_size)
    wanted = (L + patch_size - 1) // patch_size
    expect_that(wanted == Q, OP, "features", f"[B, ceil(L / patch_size), D] with {wanted}", Q)
    return even_offsets(target, patch_size)


def even_offsets(target: Tensor, patch_size: int) -> Tensor:
    """The offsets of equal patches of the target's tokens."""
    B, L = target.shape[:2]
    # NOTE: on a GPU a first call within a graph's capture would keep what was never written
    is_kept = target.is_cpu and not is_watched((target,))
    make = patches.kept_offsets if is_kept else patches.even_offsets
    return make(B, L, patch_size, target.device)
