"""Distillation losses as modules: they hold the options and hand tensors to the doors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

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
