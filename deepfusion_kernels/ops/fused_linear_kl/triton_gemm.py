"""The library's GEMMs around tiles of float32 logits.

bfloat16 factors on CUDA are multiplied as they are, with float32 results; everything else is
widened in pieces, since no library multiplies it so. float16 too: its dS would underflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

# numbers of a head that are widened, or of a float32 product that is added, at a time: 16 MiB
PIECE = 1 << 22
# a row of logits starts where 128 bytes do
PITCH = 32


def _mixed(left: Tensor) -> bool:
    """Whether the library multiplies these with a float32 result."""
    return left.is_cuda and left.dtype == torch.bfloat16


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, out float32; only a piece of `right`'s columns is widened at a time."""
    if _mixed(left):
        torch.mm(left, right, out_dtype=torch.float32, out=out)
        return
    if right.dtype == torch.float32 and left.dtype == torch.float32:
        torch.mm(left, right, out=out)
        return
    left, step = left.float(), max(1, PIECE // right.shape[0])
    for begin in range(0, right.shape[1], step):
        piece = slice(begin, begin + step)
        torch.mm(left, right[:, piece].float(), out=out[:, piece])


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total += left @ right, or = for the first; summed in float32, rounded to total's dtype."""
    if first and total.dtype == torch.float32:
        product(left, right, total)
        return
    if total.dtype == torch.float32 and left.dtype == torch.float32 == right.dtype:
        total.addmm_(left, right)
        return
    step = max(1, PIECE // right.shape[1])
    for begin in range(0, left.shape[0], step):
        piece = slice(begin, begin + step)
        part = total.new_empty(left[piece].shape[0], right.shape[1], dtype=torch.float32)
        product(left[piece], right, part)
        if first:
            total[piece] = part
        else:
            total[piece] += part


class Side:
    """One side's hidden states and head, and the memory its tiles of logits appear in."""

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        scale_T: Tensor,
        columns: int,
        tile: tuple[int, int],
    ) -> None:
        self.hidden, self.weight, self.columns = hidden_TD, weight_VD, columns
        self.bias = None if bias_V is None else bias_V.contiguous()
        self.scale_T = scale_T
        width = min(tile[1], columns)
        pitch = (width + PITCH - 1) // PITCH * PITCH
        self.memory = hidden_TD.new_empty((tile[0], pitch), dtype=torch.float32)

    def rows(self, block: slice) -> Tensor:
        """Hidden states, masked rows as zeros: 0 * NaN would reach the weight's gradient."""
        return torch.where(self.scale_T[block, None] != 0, self.hidden[block], 0)

    def project(self, block: slice, columns: slice) -> None:
        """Logits of a tile, bias not yet added; none beyond the side's columns."""
        stop = min(columns.stop, self.columns)
        if stop > columns.start:
            out = self.memory[: block.stop - block.start, : stop - columns.start]
            product(self.rows(block), self.weight[columns.start : stop].T, out)

    def tile(self, columns: slice) -> tuple[tuple[Tensor, int], Tensor | None]:
        """The tile with its pitch, and the bias of its columns."""
        bias = None if self.bias is None else self.bias[columns]
        return (self.memory, self.memory.stride(0)), bias

    def gradient_tile(self, columns: slice) -> Tensor:
        """The tile's memory as dS: bfloat16 in the front half of each row, else float32."""
        narrow = self.weight.dtype == torch.bfloat16
        memory = self.memory.view(torch.bfloat16) if narrow else self.memory
        return memory[:, : columns.stop - columns.start]
