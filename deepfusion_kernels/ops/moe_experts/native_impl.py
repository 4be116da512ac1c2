"""Calls into the native library: plan, packed products, activation and weighted sums in C++."""

from __future__ import annotations

import torch
from torch import Tensor

# their places are the numbers of csrc/common/gated_activation.h
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def forward(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [T, D]; then h [R, 2F] and the plan order [R], slots [T, K], offsets [E+1]."""
    out, h, order, slots, offsets = torch.ops.deepfusion_native.moe_experts_forward(
        hidden.contiguous(),
        gate_up_proj.contiguous(),
        down_proj.contiguous(),
        experts.contiguous(),
        weights.contiguous(),
        ACTIVATIONS.index(activation),
    )
    return out, h, order, slots, offsets


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
    del experts
    return list(
        torch.ops.deepfusion_native.moe_experts_backward(
            dout.contiguous(),
            hidden.contiguous(),
            gate_up_proj.contiguous(),
            down_proj.contiguous(),
            weights.contiguous(),
            h,
            order,
            slots,
            offsets,
            ACTIVATIONS.index(activation),
            *needs,
        )
    )
