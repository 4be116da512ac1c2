"""What makes the student's features comparable with a teacher's: trained with it, dropped after.

vaa      patches, attention over stages and positions, linear to the teacher's width
linear   L_FM = sum_j mse(pooled teacher stage j, A_j pooled student stage j + a_j)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from deepfusion_kernels import fused_linear_mse
from deepfusion_kernels.nn import ViewAlignedAttention

from ..config_tables import DistillConfig
from ..models import build
from ..seeding import generator
from .kept import KeptText


def make_views(
    student: nn.Module, teacher: nn.Module | KeptText, config: DistillConfig, seed: int, name: str
) -> nn.Module | None:
    """The trained side of L_FM for one teacher, or None where no feature is compared."""
    if config.alpha == 0 or config.feature_loss == "none":
        return None
    if not isinstance(teacher, nn.Module):
        raise ValueError("distill.feature_loss must be 'none' for log-probabilities, got features")
    widths = (_width(student), _width(teacher))
    draw = generator(seed, "views", name)
    if config.feature_loss == "linear":
        return LinearViews(*widths, config.num_stages, config.patch_size, config.target_norm, draw)
    return cast(
        nn.Module,
        ViewAlignedAttention(
            *widths,
            num_stages=config.num_stages,
            dim=config.vaa_dim,
            num_heads=config.vaa_heads,
            patch_size=config.patch_size,
            patchify=config.patchify,
            causal=config.causal,
            target_norm=config.target_norm,
            generator=draw,
        ),
    )


def _width(model: nn.Module) -> int:
    return int(build.head_weight(model).shape[1])


class LinearViews(nn.Module):
    """Per-stage linear map of mean-pooled student features: weight [J, D_t, D_s], bias [J, D_t]."""

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_stages: int,
        patch_size: int,
        target_norm: bool,
        draw: torch.Generator,
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(student_dim)
        first = torch.rand(num_stages, teacher_dim, student_dim, generator=draw)
        self.weight = nn.Parameter((2 * first - 1) * bound)
        self.bias = nn.Parameter(torch.zeros(num_stages, teacher_dim))
        self.patch_size = patch_size
        self.target_norm = target_norm

    def forward(
        self,
        student_stages: Sequence[Tensor],
        teacher_stages: Sequence[Tensor],
        *,
        backend: str | None = None,
    ) -> Tensor:
        """J tensors [B, L, D_s] and J tensors [B, L, D_t] -> scalar float32."""
        losses = [
            fused_linear_mse(
                pooled(student_BLD, self.patch_size),
                self.weight[j],
                self.bias[j],
                teacher_BLD.detach(),
                patch_size=self.patch_size,
                target_norm=self.target_norm,
                backend=backend,
            )
            for j, (student_BLD, teacher_BLD) in enumerate(
                zip(student_stages, teacher_stages, strict=True)
            )
        ]
        return torch.stack(losses).sum()


def pooled(features_BLD: Tensor, patch_size: int) -> Tensor:
    """Means over patches of patch_size tokens, the last one as long as it is: [B, q, D]."""
    patches = torch.split(features_BLD, patch_size, dim=1)
    return torch.stack([patch.mean(dim=1) for patch in patches], dim=1)
