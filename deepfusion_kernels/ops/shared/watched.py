"""Whether a call must go through an opaque op, or may take the shorter way round it.

An opaque op costs 0.1 to 0.5 ms a call, cold, for its schema is walked in Python: where nobody
looks on, a plain autograd node does the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def is_watched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a graph is traced, or a mode, transform or subclass sees operations of its own."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or any(tensor is not None and type(tensor) not in PLAIN for tensor in tensors)
    )
