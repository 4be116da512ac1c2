"""Stacks of matrices to nearly orthogonal ones: what Muon takes as the direction of its step."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from ...checks import expect
from . import native_impl, reference

DOORS = ("orthogonalise",)
IMPLS = {"reference": reference, "cpu": native_impl}
OP = "orthogonalise"


def orthogonalise(matrices: Tensor, *, backend: str | None = None) -> Tensor:
    """Five Newton-Schulz rounds on every matrix by itself; no gradient flows.

        X <- M / |M|       X <- a X + (b G + c G G) X,  G = X X^T

    matrices [..., A, B] float32 (float64: reference) -> the same shape and dtype, singular values
    about 0.7 to 1.2; a matrix of zeros stays zero. Products are bfloat16 where the processor
    multiplies it, as torch.optim.Muon's are. Raises ValueError for other shapes and dtypes.
    Source: Keller Jordan, Muon (2024).
    """
    A, B = expect(matrices, OP, "matrices", "... A B", dtype=(torch.float32, torch.float64))
    chosen = backends.choose(backend, matrices, IMPLS)
    flat_NAB = matrices.detach().reshape(-1, A, B)
    out_NAB: Tensor = _orthogonalise(flat_NAB, chosen)
    return out_NAB.view(matrices.shape)


@torch.library.custom_op("deepfusion::orthogonalise", mutates_args=())
def _orthogonalise(matrices_NAB: Tensor, backend: str) -> Tensor:
    out_NAB: Tensor = IMPLS[backend].forward(matrices_NAB)
    return out_NAB


@_orthogonalise.register_fake
def _(matrices_NAB: Tensor, backend: str) -> Tensor:
    return torch.empty_like(matrices_NAB, memory_format=torch.contiguous_format)
