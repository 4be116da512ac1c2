"""moe_experts by torch's grouped_mm: for GPUs without Triton, or where its check failed.

Rows are copied in expert order; h, a and y are whole matrices. grouped_mm wants rows of whole
16 bytes, so narrower widths are padded with zeros; what it leaves in rows past offsets[E] is
anything, and is masked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..shared import moe_plan
from .combine import combine
from .reference import activate

ROW_BYTES = 16


def declines(name: str, tensor: Tensor, **facts: Any) -> str | None:
    """grouped_mm multiplies two- and four-byte floats."""
    if tensor.dtype == torch.float64:
        return "grouped_mm serves float32, bfloat16 and float16, got float64"
    return None


def _padded(tensor: Tensor) -> Tensor:
    """The last dimension filled up with zeros to whole 16 bytes."""
    missing = -tensor.shape[-1] % (ROW_BYTES // tensor.element_size())
    return functional.pad(tensor, (0, missing)) if missing else tensor.contiguous()


class _Grouped:
    """Products over rows in expert order, of one call's plan."""

    def __init__(self, K: int, order: Tensor, offsets: Tensor) -> None:
        self.order, self.offsets = order, offsets[1:].contiguous()
        self.token_R = order.clamp(min=0) // K
        self.is_real_R1 = order[:, None] >= 0
        self.is_empty_E11 = (offsets[1:] == offsets[:-1])[:, None, None]

    def gather(self, x: Tensor) -> Tensor:
        """Rows in expert order, zeros where no slot takes one."""
        return torch.where(self.is_real_R1, x[self.token_R], 0)

    def rows(self, left: Tensor, projection: Tensor) -> Tensor:
        """left_r W[e]^T, W [E, N, depth]; zeros where no slot takes a row."""
        product = functional.grouped_mm(
            _padded(left), _padded(projection).transpose(1, 2), offs=self.offsets
        )
        return torch.where(self.is_real_R1, product, 0)

    def backwards(self, left: Tensor, projection: Tensor) -> Tensor:
        """left_r W[e], W [E, depth, N]: the way back through a projection."""
        N = projection.shape[2]
        padded = _padded(projection)
        # the depth too: its rows are those of the left factor
        missing = _padded(left).shape[1] - padded.shape[1]
        padded = functional.pad(padded, (0, 0, 0, missing)) if missing else padded
        product = functional.grouped_mm(_padded(left), padded, offs=self.offsets)[:, :N]
        return torch.where(self.is_real_R1, product, 0)

    def dweight(self, left: Tensor, right: Tensor) -> Tensor:
        """sum over each expert's rows of left_r right_r^T; written zeros for an empty expert."""
        M, N = left.shape[1], right.shape[1]
        product = functional.grouped_mm(_padded(left).T, _padded(right), offs=self.offsets)
        return product[:, :M, :N].masked_fill(self.is_empty_E11, 0).contiguous()


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
    grouped = _Grouped(experts.shape[1], plan.order, plan.offsets)
    h = grouped.rows(grouped.gather(hidden), gate_up_proj)
    gate, up = h.float().chunk(2, 1)
    a = (activate(gate, activation)[0] * up).to(h.dtype)
    y = grouped.rows(a, down_proj)
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
    needs_dhidden, needs_dgate_up, needs_ddown, needs_dweights = needs
    grouped, grads = _Grouped(experts.shape[1], order, offsets), []
    rows, weight_R = grouped.gather(dout), weights.flatten()[order.clamp(min=0)].float()
    weight_R1 = torch.where(grouped.is_real_R1, weight_R[:, None], 0)
    gate, up = h.float().chunk(2, 1)
    value, slope = activate(gate, activation)
    a = value * up
    if needs_dhidden or needs_dgate_up or needs_dweights:
        product = grouped.backwards(rows, down_proj).float()
    if needs_dhidden or needs_dgate_up:
        da = weight_R1 * product
        dh = torch.cat([da * up * slope, da * value], 1).to(h.dtype)
    if needs_dhidden:
        grads.append(combine(grouped.backwards(dh, gate_up_proj), slots, None))
    if needs_dgate_up:
        grads.append(grouped.dweight(dh, grouped.gather(hidden)))
    if needs_ddown:
        grads.append(grouped.dweight(rows, (weight_R1 * a).to(h.dtype)))
    if needs_dweights:
        dot_R = torch.where(grouped.is_real_R1, product * a, 0).sum(1)
        dweights = torch.where(slots >= 0, dot_R[slots.clamp(min=0)], 0)
        grads.append(dweights.to(weights.dtype))
    return grads
