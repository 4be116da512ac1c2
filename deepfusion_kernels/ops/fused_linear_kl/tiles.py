"""How the logits of one call are cut into tiles, and the GEMMs that fill and consume them."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor

from .problem import Gradients, Problem, Wants

# columns of a head that are widened at a time where its dtype is not that of the logits
MAX_SLICE = 4096


def spans(begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    for at in range(begin, end, step):
        yield at, min(at + step, end)


def plan(problem: Problem, whole_rows: bool) -> tuple[int, int]:
    """Rows and columns of a tile, so that chunk_bytes hold one of each side."""
    T, sides = problem.scale_T.shape[0], 2 if problem.compared else 1
    if whole_rows:
        row_bytes = (problem.columns + problem.compared) * problem.wide.itemsize
        return max(1, min(T, problem.chunk_bytes // row_bytes)), problem.columns
    numbers = max(1, problem.chunk_bytes // (sides * problem.wide.itemsize))
    # square tiles: the GEMMs then read the least for what they compute
    rows = max(1, min(T, isqrt(numbers)))
    return rows, max(1, min(problem.columns, MAX_SLICE, numbers // rows))


class Head:
    """One side's hidden states and head; its logits appear tile by tile in memory made once."""

    # whether the GEMMs want both factors in the dtype of the logits
    widens = True

    def __init__(self, problem: Problem, side: str, columns: int, tile: tuple[int, int]) -> None:
        self.weight: Tensor = getattr(problem, f"{side}_weight")
        self.bias: Tensor | None = getattr(problem, f"{side}_bias")
        self.columns, self.wide = columns, problem.wide
        hidden: Tensor = getattr(problem, f"{side}_hidden")
        hidden = hidden.to(problem.wide) if self.widens else hidden.contiguous()
        masked_T = problem.scale_T == 0
        # masked rows as zeros: 0 * NaN would reach the weight's gradient
        self.hidden = hidden.masked_fill(masked_T[:, None], 0) if masked_T.any() else hidden
        self.memory = hidden.new_empty(tile[0] * min(tile[1], columns), dtype=problem.wide)
        self.widened: tuple[int, Tensor] | None = None

    def piece(self, begin: int, end: int) -> Tensor:
        """Rows of the head, widened; the last one is kept for the next block of tokens."""
        if self.weight.dtype == self.wide:
            return self.weight[begin:end]
        if self.widened is None or self.widened[0] != begin:
            self.widened = None
            self.widened = begin, self.weight[begin:end].to(self.wide)
        return self.widened[1][: end - begin]

    def logits(self, rows: slice, begin: int, end: int) -> Tensor | None:
        """Columns [begin, end) for some tokens, or None where this side has none of them."""
        end = min(end, self.columns)
        if begin >= end:
            return None
        hidden_TD = self.hidden[rows]
        T = hidden_TD.shape[0]
        tile_TV = self.memory[: T * (end - begin)].view(T, end - begin)
        self.project(hidden_TD, begin, end, tile_TV)
        return tile_TV

    def project(self, hidden_TD: Tensor, begin: int, end: int, tile_TV: Tensor) -> None:
        for at, upto in spans(begin, end, MAX_SLICE):
            part_TV, piece_VD = tile_TV[:, at - begin : upto - begin], self.piece(at, upto)
            if self.bias is None:
                torch.mm(hidden_TD, piece_VD.T, out=part_TV)
            else:
                torch.addmm(self.bias[at:upto].to(self.wide), hidden_TD, piece_VD.T, out=part_TV)

    def add_gradients(
        self,
        dlogits_TV: Tensor,
        block: slice,
        begin: int,
        dhidden_TD: Tensor | None,
        dweight_VD: Tensor | None,
    ) -> None:
        """dhidden += dS W; dweight = dS^T hidden for the first block of tokens, then +=."""
        end = begin + dlogits_TV.shape[1]
        if dhidden_TD is not None:
            for at, upto in spans(begin, end, MAX_SLICE):
                part_TV = dlogits_TV[:, at - begin : upto - begin]
                dhidden_TD[block].addmm_(part_TV, self.piece(at, upto))
        if dweight_VD is not None:
            add_dweight(dlogits_TV, self.hidden[block], dweight_VD, block.start == 0)


def add_dweight(dlogits_TV: Tensor, hidden_TD: Tensor, dweight_VD: Tensor, first: bool) -> None:
    """dweight (+)= dS^T hidden; piece by piece where the accumulator is narrower than the sum."""
    if dweight_VD.dtype == hidden_TD.dtype:
        into = dweight_VD[: dlogits_TV.shape[1]]
        if first:
            torch.mm(dlogits_TV.T, hidden_TD, out=into)
        else:
            into.addmm_(dlogits_TV.T, hidden_TD)
        return
    for at, upto in spans(0, dlogits_TV.shape[1], MAX_SLICE):
        part_VD = dlogits_TV[:, at:upto].T @ hidden_TD
        dweight_VD[at:upto] = part_VD if first else part_VD.add_(dweight_VD[at:upto])


def empty_gradients(
    problem: Problem, wants: Wants, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> Gradients:
    """Zeros to add to, but for the rows of dweight that the first block of tokens writes."""
    hidden, weight = problem.student_hidden, problem.student_weight
    dhidden = hidden.new_zeros(hidden.shape if wants.hidden else (0,), dtype=dtypes[0])
    dweight = weight.new_empty(weight.shape if wants.weight else (0,), dtype=dtypes[1])
    dbias = weight.new_zeros(weight.shape[0] if wants.bias else 0, dtype=dtypes[2])
    dweight[problem.columns if problem.scale_T.shape[0] else 0 :].zero_()
    return Gradients(dhidden, dweight, dbias)
