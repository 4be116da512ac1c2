"""Newton-Schulz rounds towards the nearest orthogonal matrix, and the Muon optimiser's step.

X <- M / |M|       five times:  G = X X^T,  X <- a X + (b G + c G G) X
m <- m + (1 - mu) (g - m)       p <- (1 - lr decay) p - lr rms sqrt(max(A, B)) X(g + mu (m - g))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Keller Jordan's quintic: five rounds bring singular values into 0.7..1.2
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
LEAST_NORM = 1e-7


def forward(matrices_NAB: Tensor) -> Tensor:
    """Orthogonalised matrices [N, A, B]; the products in bfloat16 on CUDA, else as the input."""
    tall = matrices_NAB.shape[1] > matrices_NAB.shape[2]
    dtype = torch.bfloat16 if matrices_NAB.is_cuda else matrices_NAB.dtype
    X = (matrices_NAB.mT if tall else matrices_NAB).to(dtype)
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=LEAST_NORM)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram = X @ X.mT
        # sums within the products: no pass over memory of their own
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(matrices_NAB.dtype).contiguous()


def muon_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
    rms: float,
) -> None:
    """Moves parameters and momenta [..., A, B]; those of one shape through the rounds together."""
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for n, parameter in enumerate(parameters):
        alike.setdefault((parameter.shape, parameter.dtype), []).append(n)
    for (shape, dtype), members in alike.items():
        like = parameters[members[0]]
        ahead = torch.empty(len(members), *shape, dtype=dtype, device=like.device)
        for n, row in zip(members, ahead, strict=True):
            momenta[n].lerp_(gradients[n], 1 - momentum)
            torch.lerp(gradients[n], momenta[n], momentum, out=row)
        ahead = ahead.to(torch.promote_types(dtype, torch.float32))
        updates = forward(ahead.view(-1, *shape[-2:])).view(ahead.shape)
        for n, update in zip(members, updates, strict=True):
            if weight_decay:
                parameters[n].mul_(1 - lr * weight_decay)
            parameters[n].add_(update, alpha=-lr * rms * math.sqrt(max(shape[-2:])))
