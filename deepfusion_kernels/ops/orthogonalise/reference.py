"""Newton-Schulz rounds towards the nearest orthogonal matrix: the step of the Muon optimiser.

X <- M / |M|       five times:  G = X X^T,  X <- a X + (b G + c G G) X
"""

from __future__ import annotations

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
