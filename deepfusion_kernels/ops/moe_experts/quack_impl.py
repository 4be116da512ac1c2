"""moe_experts by the grouped products of quack-kernels, on Hopper and Blackwell; only when asked.

up gemm_gated, down gemm, dact gemm_dgated, which also scales by w and sums <dA', a>, dW gemm.
Gate and up columns alternate in the h that quack keeps; no other backend reads it.

NOTE: written against quack-kernels 0.6.5 and never run: it needs compute capability 9.0 or 10.0.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..shared import moe_plan
from .combine import combine

# ours -> quack's; its geglu is the tanh form
ACTIVATIONS = {"silu": "swiglu", "gelu_tanh": "geglu"}
DTYPES = (torch.bfloat16, torch.float16)
ARCHITECTURES = (9, 10)


def declines(name: str, tensor: Tensor, **facts: Any) -> str | None:
    """quack serves half precision, widths of whole 16 bytes, two of the activations."""
    if find_spec("quack") is None:
        return "needs quack-kernels: pip install quack-kernels"
    if tensor.device.type != "cuda":
        return f"needs CUDA tensors, got {tensor.device.type}"
    major, minor = torch.cuda.get_device_capability(tensor.device)
    if major not in ARCHITECTURES:
        return f"needs compute capability 9.x or 10.x, got {major}.{minor}"
    if tensor.dtype not in DTYPES:
        return f"moe_experts serves bfloat16 and float16, got {tensor.dtype}"
    widths = facts.get("widths", ())
    if any(width % 8 for width in widths):
        return f"moe_experts needs D % 8 == 0 and F % 8 == 0, got D, F = {list(widths)}"
    if facts.get("activation", "silu") not in ACTIVATIONS:
        return f"its gates are those of {', '.join(ACTIVATIONS)}"
    return None


def _rows_of(K: int, order: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's slot and token; rows that no slot takes read the first."""
    slot_R = order.clamp(min=0)
    return slot_R, slot_R // K


def forward(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [T, D]; then h [R, 2F] and the plan order [R], slots [T, K], offsets [E+1]."""
    quack = import_module("quack.gemm_interface")
    plan = moe_plan.plan(experts, gate_up_proj.shape[0])
    if experts.shape[0] == 0:
        return torch.empty_like(hidden), hidden.new_empty(0, gate_up_proj.shape[1]), *plan
    _, token_R = _rows_of(experts.shape[1], plan.order)
    of_rows = {"cu_seqlens_m": plan.offsets, "tuned": False}
    h, a = quack.gemm_gated(
        hidden.contiguous(), gate_up_proj.contiguous().mT, activation=ACTIVATIONS[activation],
        A_idx=token_R, concat_layout=("B",), **of_rows,
    )  # fmt: skip
    y = quack.gemm(a, down_proj.contiguous().mT, **of_rows)
    return combine(y, plan.slots, weights), h, *plan


def backward(
    dout: Tensor,
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    experts: Tensor,
    weights: Tensor,
    h: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool, bool],
) -> list[Tensor]:
    """The wanted ones of dhidden, dgate_up_proj, ddown_proj, dweights."""
    quack = import_module("quack.gemm_interface")
    slot_R, token_R = _rows_of(experts.shape[1], order)
    dout, grads = dout.contiguous(), []
    is_empty_E11 = (offsets[1:] == offsets[:-1])[:, None, None]
    of_rows = {"cu_seqlens_m": offsets, "tuned": False}
    over_rows = {"cu_seqlens_k": offsets, "tuned": False}
    dh, weighted, dot_R = quack.gemm_dgated(
        dout, down_proj.contiguous(), h, activation=ACTIVATIONS[activation], A_idx=token_R,
        colvec_scale=weights.flatten()[slot_R].float(), colvec_reduce=True, **of_rows,
    )  # fmt: skip
    if needs[0]:
        dx = quack.gemm(dh, gate_up_proj.contiguous(), concat_layout=("B",), **of_rows)
        grads.append(combine(dx, slots, None))
    if needs[1]:
        # quack gathers its left factor alone
        x = hidden[token_R]
        dgate_up = quack.gemm(dh.T, x, concat_layout=("out",), **over_rows)
        grads.append(dgate_up.masked_fill_(is_empty_E11, 0))
    if needs[2]:
        ddown = quack.gemm(dout.T, weighted, A_idx=token_R, **over_rows)
        grads.append(ddown.masked_fill_(is_empty_E11, 0))
    if needs[3]:
        dweights = torch.where(slots >= 0, dot_R[slots.clamp(min=0)], 0)
        grads.append(dweights.to(weights.dtype))
    return grads
