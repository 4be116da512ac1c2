"""Distillation losses as modules: they hold the options and hand tensors to the doors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.fused_linear_kl.op import fused_linear_kl_distillation
from ..ops.kl_distillation.op import kl_distillation


class KLDistillationLoss(nn.Module):
    """kl_distillation with its options fixed, as KLDistillationLoss(temperature=2.0).

    Options are the keywords of deepfusion_kernels.kl_distillation except row_weight, which is given
    with the tensors. Raises what the door raises, at the call.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """student_logits [..., V_s], teacher_logits [..., V_t] -> float32 scalar, or [...]."""
        return kl_distillation(
            student_logits, teacher_logits, labels, row_weight=row_weight, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class FusedLinearKLDistillationLoss(nn.Module):
    """fused_linear_kl_distillation with its options fixed; logits are never whole in memory.

    Options are the keywords of deepfusion_kernels.fused_linear_kl_distillation except biases and
    row_weight, which are given with the tensors. compact: masked rows are dropped before the GEMMs,
    which pays where many are; on a GPU their count costs one synchronisation with the host, and the
    shapes then depend on the data, so a full graph cannot hold it.
    """

    def __init__(self, *, compact: bool = False, **options: Any) -> None:
        super().__init__()
        self.compact = compact
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        labels: Tensor | None = None,
        row_weight: Tensor | None = None,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        """hidden [..., D], weight [V, D] of either side -> float32 scalar, or [...]."""
        kept = self._kept(labels, row_weight) if self.compact else None

        def rows(of: Tensor | None) -> Tensor | None:
            return of if of is None or kept is None else of[kept]

        loss = fused_linear_kl_distillation(
            student_hidden if kept is None else student_hidden[kept],
            student_weight,
            rows(teacher_hidden),
            teacher_weight,
            rows(labels),
            row_weight=rows(row_weight),
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            **self.options,
        )
        if kept is None or self.options.get("reduction", "mean") != "none":
            return loss
        return loss.new_zeros(student_hidden.shape[:-1]).index_put(kept, loss)

    def _kept(self, labels: Tensor | None, row_weight: Tensor | None) -> tuple[Tensor, ...] | None:
        """Where the unmasked rows stand, or None where nothing can be masked."""
        masks = []
        if labels is not None:
            masks.append(labels != self.options.get("ignore_index", -100))
        if row_weight is not None:
            masks.append(row_weight != 0)
        return torch.stack(masks).all(0).nonzero(as_tuple=True) if masks else None

    def extra_repr(self) -> str:
        shown = {**self.options, "compact": self.compact}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
