"""Experts of other packages and of torch.compile, each optional (requirements/bench.txt).

Functions `<peer>_<door>` as in peers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from benchmarks.baselines import grouped_mm_moe_experts
from deepfusion_kernels import moe_experts


@cache
def _compiled(*what: object) -> Callable[..., Tensor]:
    """One compilation for each kind of call: torch counts those of one function, and gives up."""
    torch._dynamo.reset()
    return torch.compile(grouped_mm_moe_experts, dynamic=False, fullgraph=True)


def compiled_grouped_mm_moe_experts(
    hidden: Tensor, gate_up_proj: Tensor, down_proj: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """The default of transformers through torch.compile, as one graph of static shapes."""
    tensors = (hidden, gate_up_proj, down_proj, experts, weights)
    kind = tuple((each.shape, each.dtype, each.device, each.requires_grad) for each in tensors)
    return _compiled(kind)(*tensors)


def liger_moe_experts(
    hidden: Tensor, gate_up_proj: Tensor, down_proj: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """Liger's fused experts in Triton."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    if hidden.device.type == "cpu":
        raise NotImplementedError("liger: its Triton kernels need a GPU")
    ids = experts.to(torch.int32)
    out: Tensor = LigerFusedMoEFunction.apply(hidden, gate_up_proj, down_proj, ids, weights)
    return out


def quack_moe_experts(
    hidden: Tensor, gate_up_proj: Tensor, down_proj: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """quack's grouped products under our plan: the backend of that name, which says why not."""
    return moe_experts(hidden, gate_up_proj, down_proj, experts, weights, backend="quack")
