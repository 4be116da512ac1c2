"""pytest plugin for Liger-Kernel's own suites: its fused JSD losses become calls of our door."""

from typing import Any

import liger_kernel.chunked_loss.functional
import liger_kernel.chunked_loss.jsd_loss
import liger_kernel.transformers.fused_linear_jsd
from torch import Tensor, nn

from deepfusion_kernels import fused_linear_kl_distillation


def jsd(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor | None,
    **options: Any,
) -> Tensor:
    (hidden, weight, bias), (of_teacher, head, teacher_bias) = student, teacher
    loss: Tensor = fused_linear_kl_distillation(
        hidden, weight, of_teacher.detach(), head.detach(), labels, student_bias=bias,
        teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
        divergence="jsd", **options,
    )  # fmt: skip
    return loss.to(hidden.dtype)


class FusedLinearJSD(nn.Module):
    """Stands in for LigerFusedLinearJSD: no cross entropy, mean over the labels that count."""

    def __init__(
        self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0, **_: Any
    ) -> None:
        super().__init__()
        self.options = {"beta": jsd_beta, "temperature": temperature, "ignore_index": ignore_index}

    def forward(
        self, hidden: Tensor, weight: Tensor, of_teacher: Tensor, head: Tensor, labels: Any = None
    ) -> Tensor:
        return jsd((hidden, weight, None), (of_teacher, head, None), labels, **self.options)


class ChunkedJSD(nn.Module):
    """Stands in for LigerFusedLinearJSDLoss: soft and hard loss by their weights, with biases."""

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        **_: Any,
    ) -> None:
        super().__init__()
        self.options = {
            "kd_weight": weight_soft_loss,
            "ce_weight": weight_hard_loss,
            "beta": beta,
            "ignore_index": ignore_index,
            "temperature": temperature,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        of_teacher: Tensor,
        head: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        student, teacher = (hidden, weight, bias), (of_teacher, head, teacher_bias)
        return jsd(student, teacher, labels, **self.options)


def chunked(*arguments: Any) -> Tensor:
    """Stands in for the functional liger_fused_linear_jsd of the chunked losses."""
    tensors, (hard, soft, beta, ignore_index, temperature) = arguments[:7], arguments[7:]
    return ChunkedJSD(hard, soft, beta, ignore_index, temperature)(*tensors)


liger_kernel.transformers.fused_linear_jsd.LigerFusedLinearJSD = FusedLinearJSD
liger_kernel.chunked_loss.functional.liger_fused_linear_jsd = chunked
liger_kernel.chunked_loss.jsd_loss.LigerFusedLinearJSDLoss = ChunkedJSD
liger_kernel.chunked_loss.LigerFusedLinearJSDLoss = ChunkedJSD
