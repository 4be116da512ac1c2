"""Library products: summed in at least float32, rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def _widened(tensor: Tensor) -> Tensor:
    # few processors multiply float16; the library's fallback is many times slower than float32
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, matrices; out may be any view, and wider where they are float16."""
    if torch.float16 in (left.dtype, right.dtype):
        out.copy_(_widened(left) @ _widened(right))
    else:
        torch.mm(left, right, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, matrices; total may be wider than they are."""
    left, right = _widened(left), _widened(right)
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def wide_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, float32; the library multiplies narrow factors so on CUDA alone."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)
