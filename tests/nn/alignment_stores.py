"""How far half precision may lead: what each tensor that is stored in between adds by its rounding.

The float64 law is run once for every store, each element of that one tensor off by its whole half
unit, to the side that it rounds to. First-order effects add up: together the stores lead no further
than the sum of their largest effects.
"""

from typing import Any

import torch
from torch import Tensor

from deepfusion_kernels import view_aligned_attention
from tests.budget import UNIT, assert_within_budget
from tests.nn.alignment_spelling import feature_loss
from tests.nn.alignment_variants import cast, run

# (place in the spelling, whether what flows forward or backward there is stored)
STORES = {
    "means": ("means", True),
    "X": ("x", True),
    "QKV": ("qkv", True),
    "Y": ("y", True),
    "E": ("prediction", False),
    "dY": ("y", False),
    "dQKV": ("qkv", False),
    "dX": ("x", False),
}


def _half_unit(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error that rounding to dtype can make."""
    return UNIT[dtype] * 2.0 ** (value.frexp().exponent.double() - 1)


def _half_unit_off(value: Tensor, dtype: torch.dtype) -> Tensor:
    """With that error, to the side on which rounding falls."""
    return value + _half_unit(value, dtype) * (value.to(dtype).double() - value).sign()


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dtype: torch.dtype, is_forward: bool) -> Tensor:
        ctx.dtype, ctx.is_forward = dtype, is_forward
        return _half_unit_off(value, dtype) if is_forward else value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream if ctx.is_forward else _half_unit_off(upstream, ctx.dtype), None, None


def rounding_floors(given: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """For every gradient: the largest effects of all stores, and the result's own rounding."""
    exact = cast(given, torch.float64)
    _, law = run(feature_loss, exact)
    floors = [_half_unit(gradient.abs().max(), dtype) for gradient in law]
    for place, is_forward in STORES.values():

        def store(name: str, value: Tensor, at: str = place, way: bool = is_forward) -> Tensor:
            return _Rounded.apply(value, dtype, way) if name == at else value

        _, moved = run(feature_loss, exact, store=store)
        for i, (one, other) in enumerate(zip(moved, law, strict=True)):
            floors[i] = floors[i] + (one - other).abs().max()
    return floors


def assert_joined_within_budget(given: dict[str, Any], backend: str) -> None:
    """The joined loss and all its gradients; half precision by the count of its stores."""
    dtype = given["qkv_weight"].dtype
    ours, ours_grads = run(view_aligned_attention, given, backend=backend)
    eager, eager_grads = run(feature_loss, given)
    truth, truth_grads = run(
        view_aligned_attention, cast(given, torch.float64), backend="reference"
    )
    units = {torch.float64: 1e-12, torch.float32: 4e-6}.get(dtype, UNIT[dtype])
    assert_within_budget(ours, eager, truth, "loss", units * truth.abs())
    half = dtype in (torch.bfloat16, torch.float16)
    floors = rounding_floors(given, dtype) if half else [None] * len(truth_grads)
    triples = zip(ours_grads, eager_grads, truth_grads, floors, strict=True)
    for i, (mine, plain, law, floor) in enumerate(triples):
        assert_within_budget(mine, plain, law, f"gradient {i}", floor)
