"""pytest plugin for TRL's own test suite: its generalised JSD becomes a call of our door."""

from typing import Any

from torch import Tensor
from trl.experimental.gkd import GKDTrainer

from deepfusion_kernels import kl_distillation


def generalized_jsd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    **_: Any,
) -> Tensor:
    """TRL's batchmean divides by the first dimension, or by the labels that count."""
    reduce = "sum" if reduction == "batchmean" else reduction
    loss = kl_distillation(
        student, teacher, labels, divergence="jsd", beta=float(beta), temperature=temperature,
        reduction=reduce,
    )  # fmt: skip
    if reduction != "batchmean":
        return loss
    return loss / ((labels != -100).sum() if labels is not None else student.shape[0])


GKDTrainer.generalized_jsd_loss = staticmethod(generalized_jsd_loss)
