"""Losses of other packages, each optional (requirements/bench.txt).

A function `<peer>_<door>` takes the door's arguments, as in baselines.py, and raises ImportError
where its package is absent, NotImplementedError for what the package does not offer.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

# TRL and Liger call forward KL 0, reverse KL 1 and what lies between JSD
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}


def _mean(loss: Tensor, labels: Tensor | None) -> Tensor:
    return loss.mean() if labels is None else loss[labels != -100].mean()


def trl_fused_linear_kl_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    **options: Any,
) -> Tensor:
    """TRL's chunked divergence: Triton on a GPU, the same tiles folded by torch on the CPU."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    if ce_weight or teacher_hidden is None or teacher_weight is None:
        raise NotImplementedError("trl: the chunked divergence has no cross-entropy")
    loss, _ = ChunkedDivergenceFunction.apply(
        student_hidden,
        student_weight,
        None,
        teacher_hidden,
        teacher_weight,
        None,
        BETAS.get(divergence, beta),
        temperature,
    )
    return _mean(loss, labels)


def liger_fused_linear_kl_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    **options: Any,
) -> Tensor:
    """Liger's chunked JSD loss, plain torch under torch.compile: it runs on the CPU too."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    if teacher_hidden is None or teacher_weight is None:
        raise NotImplementedError("liger: the chunked JSD needs a teacher")
    if labels is None:
        labels = student_hidden.new_zeros(student_hidden.shape[0]).long()
    loss: Tensor = LigerFusedLinearJSDLoss(
        weight_hard_loss=ce_weight,
        weight_soft_loss=kd_weight,
        beta=BETAS.get(divergence, beta),
        temperature=temperature,
    )(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
    return loss


def liger_kl_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Liger's KL and JSD kernels behind the log_softmax that they ask of the caller."""
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    if student_logits.device.type == "cpu":
        raise NotImplementedError("liger: its Triton kernels need a GPU")
    if ce_weight or labels is not None or reduction != "mean":
        raise NotImplementedError("liger: no labels, no cross-entropy, mean alone")
    ln_q, ln_p = (
        F.log_softmax(logits.float() / temperature, -1)
        for logits in (student_logits, teacher_logits)
    )
    loss: Tensor
    if divergence == "forward_kl":
        loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)(ln_q, ln_p)
    else:
        loss = LigerJSD(beta=BETAS.get(divergence, beta))(ln_q, ln_p)
    return loss
