"""Stacks of matrices to nearly orthogonal ones, and the step of Muon that goes along them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from ...checks import expect, expect_that
from . import native_impl, reference

DOORS = ("orthogonalise", "muon_step")
IMPLS = {"reference": reference, "cpu": native_impl}
OP, STEP = "orthogonalise", "muon_step"


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


@torch.no_grad()
def muon_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    rms: float = 0.2,
    backend: str | None = None,
) -> None:
    """One step of Muon in place: every parameter along its orthogonalised look-ahead.

        m <- m + (1 - mu) (g - m)       X = orthogonalise(g + mu (m - g))
        p <- (1 - lr decay) p - lr rms sqrt(max(A, B)) X

    parameters, gradients, momenta: as many tensors [..., A, B] of equal shapes each, floats; a
    parameter of more axes is a stack of matrices. Raises ValueError for others.
    Source: torch.optim.Muon with adjust_lr_fn 'match_rms_adamw' (arXiv 2502.16982).
    """
    for role, tensors in (("gradients", gradients), ("momenta", momenta)):
        wanted = f"{len(parameters)} tensors, one a parameter"
        expect_that(len(tensors) == len(parameters), STEP, role, wanted, len(tensors))
        for one, parameter in zip(tensors, parameters, strict=True):
            expect(parameter, STEP, "every parameter", "... A B", like=parameters[0])
            expect(one, STEP, role, "... A B", dtype=parameter.dtype, like=parameter)
            shape = list(parameter.shape)
            expect_that(one.shape == parameter.shape, STEP, role, f"{shape}", list(one.shape))
    if not parameters:
        return
    chosen = backends.choose(backend, parameters[0], IMPLS, in_place=(*parameters, *momenta))
    _muon_step(
        list(parameters), list(gradients), list(momenta), lr, momentum, weight_decay, rms, chosen
    )


@torch.library.custom_op("deepfusion::muon_step", mutates_args=("parameters", "momenta"))
def _muon_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
    rms: float,
    backend: str,
) -> None:
    IMPLS[backend].muon_step(parameters, gradients, momenta, lr, momentum, weight_decay, rms)


@_muon_step.register_fake
def _(parameters: list[Tensor], *rest: object) -> None:
    return None
