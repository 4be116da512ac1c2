"""Which row of a sorted buffer each (token, choice) slot takes.

order[r] = flat slot t K + k of row r, or -1 past offsets[E]
slots[t, k] = its row, or -1 for a sentinel: an id < 0 or >= E, which owns no row
rows of expert e = offsets[e] .. offsets[e + 1], in slot order
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DispatchPlan(NamedTuple):
    """order [R] int32, slots [T, K] int32, offsets [E+1] int32; R = T * K."""

    order: Tensor
    slots: Tensor
    offsets: Tensor


def plan(experts: Tensor, num_experts: int) -> DispatchPlan:
    """The plan of experts [T, K] (int64 or int32) by a stable sort: no host sync, no one-hot."""
    T, K = experts.shape
    flat_R = experts.reshape(-1)
    is_real_R = (flat_R >= 0) & (flat_R < num_experts)
    flat_R = torch.where(is_real_R, flat_R, num_experts)
    order_R = flat_R.argsort(stable=True)
    bounds = torch.arange(num_experts + 1, device=experts.device, dtype=flat_R.dtype)
    # bincount would sync with the host
    offsets_E1 = torch.searchsorted(flat_R[order_R], bounds, out_int32=True)
    rows_R = torch.arange(T * K, device=experts.device, dtype=torch.int32)
    slots_R = torch.empty_like(rows_R).scatter_(0, order_R, rows_R)
    slots_R = torch.where(is_real_R, slots_R, -1)
    order_R = torch.where(rows_R < offsets_E1[-1], order_R.to(torch.int32), -1)
    return DispatchPlan(order_R, slots_R.view(T, K), offsets_E1)
