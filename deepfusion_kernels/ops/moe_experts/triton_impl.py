"""moe_experts in Triton: which kernels a direction takes, and which tensors live between them.

forward   up (h, a) -> down (y) -> combine
backward  dact (dh, a' = w a, dw partials) -> dW2, dX -> combine with w = 1, dW1

Saved: the inputs, h and the plan. Nothing is copied to the host.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..._triton import triton
from ..shared import moe_plan
from . import triton_check
from .triton_launch import Launcher


def declines(name: str, tensor: Tensor, **facts: Any) -> str | None:
    """Triton serves two- and four-byte floats where its answers have been found right."""
    if tensor.dtype == torch.float64:
        return "moe_experts serves float32, bfloat16 and float16, got float64"
    if not torch.compiler.is_compiling() and tensor.is_cuda:
        if torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return "moe_experts needs compute capability 8.0"
        # nothing can be tried there, and nothing has been found wrong
        if isinstance(tensor, FakeTensor) or torch.cuda.is_current_stream_capturing():
            return None
    reason: str | None = found_wrong(str(tensor.device))
    return reason


@torch.compiler.assume_constant_result
def found_wrong(device: str) -> str | None:
    """The reason to leave Triton alone on a device; a graph being compiled takes it as it is."""
    return _tried_once(device, triton.__version__)


@cache
def _tried_once(device: str, version: str) -> str | None:
    with torch.no_grad():
        off = triton_check.off(torch.device(device), forward, backward)
    if not off:
        return None
    reason = f"failed its start-up check on {device} with triton {version}: {off}"
    warnings.warn(f"moe_experts: triton {reason}; it is switched off", stacklevel=2)
    return reason


def forward(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    experts: Tensor,
    weights: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [T, D]; then h [R, 2F] and the plan order [R], slots [T, K], offsets [E+1]."""
    plan = moe_plan.plan(experts, gate_up_proj.shape[0])
    if experts.shape[0] == 0:
        return torch.empty_like(hidden), hidden.new_empty(0, gate_up_proj.shape[1]), *plan
    with torch.cuda.device_of(hidden):
        gate_up_proj, down_proj = gate_up_proj.contiguous(), down_proj.contiguous()
        launch = Launcher(gate_up_proj, activation, plan)
        h, a = launch.up(launch.copied(hidden.contiguous()), gate_up_proj)
        y = launch.rows(a, down_proj, True, launch.config.down)
        return launch.combine(y, weights.contiguous()), h, *plan


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
    needs_dhidden, needs_dgate_up, needs_ddown, needs_dweights = needs
    grads = []
    with torch.cuda.device_of(hidden):
        gate_up_proj, down_proj = gate_up_proj.contiguous(), down_proj.contiguous()
        launch = Launcher(gate_up_proj, activation, (order, slots, offsets))
        rows = launch.copied(dout.contiguous())
        dh, weighted, partials = launch.dact(
            rows,
            down_proj,
            h,
            weights.contiguous(),
            (needs_dhidden or needs_dgate_up, needs_ddown, needs_dweights),
        )
        if needs_dhidden and dh is not None:
            dx = launch.rows(dh, gate_up_proj, False, launch.config.dx)
            grads.append(launch.combine(dx, None))
            del dx
        if needs_dgate_up and dh is not None:
            x = launch.copied(hidden.contiguous())
            grads.append(launch.dweight(dh, x, "right", gate_up_proj))
        if weighted is not None:
            grads.append(launch.dweight(rows, weighted, "left", down_proj))
        if partials is not None:
            grads.append(launch.dweights(partials, weights))
    return grads
