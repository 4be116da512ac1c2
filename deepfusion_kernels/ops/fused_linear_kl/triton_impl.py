"""Triton row kernels around the library's GEMMs: tiles of float32 logits, dS in their memory.

many rows a chunk  whole rows: statistics, then dS, then the GEMMs that consume it; the gradients
                   are formed in forward, while the chunk's logits are there
few rows a chunk   slices of the vocabulary: forward keeps the statistics, backward projects again
                   and finishes the head's gradient slice by slice
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ..._triton import triton
from ..shared.kl_options import DIVERGENCES
from .problem import Gradients, Problem, Wants
from .triton_gemm import Side, add_product
from .triton_rows import (
    SUMS,
    _accumulate_kernel,
    _finish_kernel,
    _gradient_kernel,
    _jsd_kernel,
)

STATISTICS = 8
# columns by divergence, not measured: what compiles without spills for all four targets
BLOCK_V = (4096, 4096, 2048)
BLOCK_T = 128
LAUNCH = {"num_warps": 8, "maxnreg": 128}
FINISH_LAUNCH = {"num_warps": 4, "maxnreg": 128}
# a GEMM of fewer rows does not pay for reading the head
MIN_ROWS = 128
# a square tile of this side stays in the second-level cache of the targets
MAX_SIDE = 2048


def declines(name: str, tensor: Tensor, **facts: Any) -> str | None:
    """Triton serves two- and four-byte floats."""
    if torch.float64 in (tensor.dtype, facts.get("wide")):
        return "fused_linear_kl_distillation serves float32, bfloat16 and float16, got float64"
    return None


def plan(problem: Problem) -> tuple[int, int]:
    """Rows and columns of a tile, so that chunk_bytes hold one of each side."""
    T, sides = problem.scale_T.shape[0], 2 if problem.compared else 1
    rows = problem.chunk_bytes // (4 * (problem.columns + problem.compared))
    if rows >= min(T, MIN_ROWS):
        rows = rows - rows % MIN_ROWS if rows >= MIN_ROWS else rows
        return max(1, min(T, rows)), problem.columns
    numbers = max(1, problem.chunk_bytes // (4 * sides))
    rows = max(1, min(T, MAX_SIDE, isqrt(numbers)))
    return rows, max(1, min(problem.columns, MAX_SIDE, numbers // rows))


def spans(count: int, step: int) -> Iterator[slice]:
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def forward(
    problem: Problem, wants: Wants, grad_weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Gradients]:
    """Rows [T] times their scale, statistics [T, 8], and the gradients of the rows' sum."""
    kept = _empty(problem, wants, (torch.float32, grad_weight_dtype, torch.float32))
    rows = Rows(problem)
    T = problem.scale_T.shape[0]
    losses_T, statistics = problem.scale_T.new_empty(T), problem.scale_T.new_empty(T, STATISTICS)
    for block in spans(T, rows.tile[0]):
        losses_T[block], statistics[block] = rows.statistics(block)
        if not any(wants):
            continue
        for columns in spans(problem.columns, rows.tile[1]):
            dlogits = rows.gradient(block, columns, statistics, problem.scale_T)
            rows.add_gradients(dlogits, block, columns, kept, wants)
    return losses_T, statistics, kept


def backward(problem: Problem, drows_T: Tensor, statistics: Tensor, wants: Wants) -> Gradients:
    """Projects again; of the head's gradient it holds one slice beside the result."""
    dtypes = problem.dtypes
    wide = _empty(problem, wants, (torch.float32, dtypes[1], torch.float32))
    dweight = wide.dweight
    rows, scale_T = Rows(problem), problem.scale_T * drows_T
    T = scale_T.shape[0]
    for columns in spans(problem.columns if T else 0, rows.tile[1]):
        # one block of rows is one GEMM, rounded once; several are added up in float32
        direct = rows.tile[0] >= T or dweight.dtype == torch.float32
        total = dweight[columns]
        total = total if direct or not wants.weight else torch.empty_like(total).float()
        for block in spans(T, rows.tile[0]):
            dlogits = rows.gradient(block, columns, statistics, scale_T)
            rows.add_gradients(dlogits, block, columns, wide, wants._replace(weight=False))
            if wants.weight:
                hidden = rows.student.rows(block)
                add_product(total, dlogits.T, hidden, first=block.start == 0)
        if wants.weight and not direct:
            dweight[columns] = total
    return Gradients(wide.dhidden.to(dtypes[0]), dweight, wide.dbias.to(dtypes[2]))


def _empty(problem: Problem, wants: Wants, dtypes: tuple[torch.dtype, ...]) -> Gradients:
    hidden, weight = problem.student_hidden, problem.student_weight
    dhidden = hidden.new_empty(hidden.shape if wants.hidden else (0,), dtype=dtypes[0])
    dweight = weight.new_empty(weight.shape if wants.weight else (0,), dtype=dtypes[1])
    dbias = weight.new_zeros(weight.shape[0] if wants.bias else 0, dtype=dtypes[2])
    # the first block of rows writes the other rows of dweight
    dweight[problem.columns if hidden.shape[0] else 0 :].zero_()
    return Gradients(dhidden, dweight, dbias)


class Rows:
    """The row kernels on the tiles of one call."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.tile = problem, plan(problem)
        scale_T, self.teacher = problem.scale_T, None
        self.student = Side(
            problem.student_hidden, problem.student_weight, problem.student_bias,
            scale_T, problem.columns, self.tile,
        )  # fmt: skip
        if problem.teacher_hidden is not None and problem.teacher_weight is not None:
            self.teacher = Side(
                problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias,
                scale_T, problem.compared, self.tile,
            )  # fmt: skip
        self.labels = None if problem.labels is None else problem.labels.contiguous()
        self.divergence = DIVERGENCES.index(problem.divergence)
        # CE at temperature 1 over the same columns shares the student's normaliser
        shared = problem.temperature == 1 and problem.columns == problem.compared
        self.own_sum = bool(problem.ce_weight) and not shared
        self.there: tuple[int, int] | None = None

    def _tiles(self, block: slice, columns: slice) -> tuple[Any, ...]:
        """Both sides' logits of a tile, projected unless they are still there, and biases."""
        if self.there != (block.start, columns.start):
            self.student.project(block, columns)
            if self.teacher is not None:
                self.teacher.project(block, columns)
            self.there = (block.start, columns.start)
        teacher = self.teacher
        if teacher is None or columns.start >= teacher.columns:
            return *self.student.tile(columns), None, None
        return *self.student.tile(columns), *teacher.tile(columns)

    def _widths(self, columns: slice) -> tuple[int, int, int]:
        shared = max(0, min(self.problem.compared, columns.stop) - columns.start)
        return columns.start, columns.stop - columns.start, shared

    def _block(self, columns: slice) -> int:
        width = max(16, triton.next_power_of_2(columns.stop - columns.start))
        return int(min(BLOCK_V[self.divergence], width))

    def _labels(self, block: slice) -> Tensor | None:
        return None if self.labels is None else self.labels[block]

    def statistics(self, block: slice) -> tuple[Tensor, Tensor]:
        """Losses and statistics of a block of rows."""
        problem, scale_T = self.problem, self.problem.scale_T[block]
        rows = scale_T.shape[0]
        sums = scale_T.new_empty(rows, SUMS)
        inv_tau = 1 / problem.temperature
        with torch.cuda.device_of(scale_T):
            for columns in spans(problem.columns, self.tile[1]):
                _accumulate_kernel[(rows,)](
                    *self._tiles(block, columns), self._labels(block), scale_T, sums,
                    self._widths(columns), inv_tau, DIVERGENCE=self.divergence,
                    OWN_SUM=self.own_sum, BLOCK_V=self._block(columns), **LAUNCH,
                )  # fmt: skip
            if problem.divergence != "jsd" or not problem.compared:
                return self._finish(sums, scale_T)
            # their k_s and k_t are not there yet
            sums[:, 9:] = 0
            _, statistics = self._finish(sums, scale_T)
            for columns in spans(problem.compared, self.tile[1]):
                begin, _, shared = self._widths(columns)
                _jsd_kernel[(rows,)](
                    *self._tiles(block, columns), scale_T, statistics, sums, (begin, shared),
                    (problem.beta, inv_tau), BLOCK_V=self._block(columns), **LAUNCH,
                )  # fmt: skip
            return self._finish(sums, scale_T)

    def _finish(self, sums: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
        problem, rows = self.problem, scale_T.shape[0]
        losses_T, statistics = torch.empty_like(scale_T), scale_T.new_empty(rows, STATISTICS)
        _finish_kernel[(triton.cdiv(rows, BLOCK_T),)](
            scale_T, sums, losses_T, statistics, rows,
            (problem.beta, problem.kd_scale, problem.ce_weight), DIVERGENCE=self.divergence,
            WITH_KD=self.teacher is not None, WITH_CE=self.labels is not None,
            OWN_SUM=self.own_sum, BLOCK_T=BLOCK_T, **FINISH_LAUNCH,
        )  # fmt: skip
        return losses_T, statistics

    def gradient(self, block: slice, columns: slice, statistics: Tensor, scale_T: Tensor) -> Tensor:
        """dS of one tile, in the memory of its logits."""
        problem, tiles = self.problem, self._tiles(block, columns)
        dlogits = self.student.gradient_tile(columns)
        scalars = (
            problem.beta, 1 / problem.temperature, problem.kd_scale / problem.temperature,
            problem.ce_weight,
        )  # fmt: skip
        rows = block.stop - block.start
        with torch.cuda.device_of(scale_T):
            _gradient_kernel[(rows,)](
                *tiles, self._labels(block), scale_T[block], statistics[block],
                (dlogits, dlogits.stride(0)), self._widths(columns), scalars,
                DIVERGENCE=self.divergence, BLOCK_V=self._block(columns), **LAUNCH,
            )  # fmt: skip
        self.there = None
        return dlogits[:rows]

    def add_gradients(
        self, dlogits: Tensor, block: slice, columns: slice, into: Gradients, wants: Wants
    ) -> None:
        """dhidden += dS W, dweight += dS^T hidden, dbias += sums over the rows of dS."""
        if wants.hidden:
            weight = self.problem.student_weight[columns]
            add_product(into.dhidden[block], dlogits, weight, first=columns.start == 0)
        if wants.weight:
            hidden = self.student.rows(block)
            add_product(into.dweight[columns], dlogits.T, hidden, first=block.start == 0)
        if wants.bias:
            into.dbias[columns] += dlogits.sum(0, dtype=torch.float32)
