"""The loss of several stages at once, for callers inside an opaque op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native_impl
from .errors import IMPLS, errors


def stage_errors(
    features_SND: Tensor,
    weight_SMD: Tensor,
    bias_SM: Tensor | None,
    targets: Sequence[Tensor],
    offsets_BQ1: Tensor,
    mask_BL: Tensor | None,
    scale_SN: Tensor,
    target_norm: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`errors` of every stage [S, ...]: in one call where the backend has one."""
    if IMPLS[backend] is native_impl and native_impl.serves_stages(features_SND, weight_SMD):
        return native_impl.forward_stages(
            features_SND, weight_SMD, bias_SM, targets, offsets_BQ1, mask_BL, scale_SN,
            target_norm, 0, *needs,
        )  # fmt: skip
    parts = [
        errors(
            features_SND[j], weight_SMD[j], None if bias_SM is None else bias_SM[j], target,
            offsets_BQ1, mask_BL, scale_SN[j], target_norm, 0, needs, backend,
        )
        for j, target in enumerate(targets)
    ]  # fmt: skip
    sse_SN, *gradients = (torch.stack(column) for column in zip(*parts, strict=True))
    kept = [g if need else g.new_empty(0) for g, need in zip(gradients, needs, strict=True)]
    return sse_SN, kept[0], kept[1], kept[2]
