"""Teachers, the second spelling and the gradient of a top-k loss, for its tests."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from deepfusion_kernels import topk_kl_distillation

KINDS = [
    *itertools.product(("bucket", "renormalize"), ("forward_kl", "reverse_kl", "jsd")),
    ("zero", "forward_kl"),
]


def teacher_of(T: int, V: int, K: int, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    logprobs, ids = (3 * torch.randn(T, V, dtype=torch.float64) / tau).log_softmax(-1).topk(K)
    return ids, logprobs


def by_torch(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: str,
    divergence: str,
    beta: float,
    tau: float,
) -> Tensor:
    """KD rows in torch's own functions; ids distinct and inside."""
    lnq = ((logits / tau) if tail == "renormalize" else (logits / tau).log_softmax(-1)).gather(
        1, ids
    )
    if tail == "renormalize":
        lnq, logprobs = lnq.log_softmax(-1), logprobs.log_softmax(-1)
    if tail == "bucket":
        lnq, logprobs = (
            torch.cat([x, (1 - x.exp().sum(1, keepdim=True)).clamp(min=2**-24).log()], 1)
            for x in (lnq, logprobs)
        )
    if divergence == "forward_kl":
        return F.kl_div(lnq, logprobs, log_target=True, reduction="none").sum(-1)
    if divergence == "reverse_kl":
        return F.kl_div(logprobs, lnq, log_target=True, reduction="none").sum(-1)
    m = (beta * logprobs.exp() + (1 - beta) * lnq.exp()).log()
    of_teacher = F.kl_div(m, logprobs, log_target=True, reduction="none").sum(-1)
    return beta * of_teacher + (1 - beta) * F.kl_div(m, lnq, log_target=True, reduction="none").sum(
        -1
    )


def gradient(
    logits: Tensor, *teacher: Tensor, upstream: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    rows = topk_kl_distillation(logits, *teacher, reduction="none", **options)
    rows.backward(upstream.to(rows.dtype))
    assert logits.grad is not None
    return rows.detach(), logits.grad
