"""Tiles of float32 logits by the library's GEMM, their rows by C++.

losses only      the vocabulary slice by slice: sums of each row, merged across slices
backward         the same slices again, now with the rows' statistics: dS in place of the logits,
                 dhidden += dS W_slice, dW_slice = dS^T hidden, finished before the next slice
both in forward  chunk of rows by chunk: whole rows of logits, so that nothing is projected twice
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..shared.kl_options import DIVERGENCES, MISSING
from .problem import Gradients, Problem, Wants
from .tiles import Head, empty_gradients, plan, spans

STATISTICS = 8
SUMS = 13
_native = torch.ops.deepfusion_native


def forward(
    problem: Problem, wants: Wants, grad_weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Gradients]:
    """Rows [T] times their scale, statistics [T, 8], and the gradients of the rows' sum."""
    kept = empty_gradients(problem, wants, (problem.wide, grad_weight_dtype, problem.wide))
    rows = Rows(problem, plan(problem, whole_rows=any(wants)))
    if not any(wants):
        return *rows.statistics(rows.blocks), kept
    losses_T = problem.scale_T.new_empty(rows.T)
    statistics = problem.scale_T.new_empty(rows.T, STATISTICS)
    for block in rows.blocks:
        losses_T[block], statistics[block] = rows.statistics([block])
        dlogits_TV = rows.gradient(block, 0, problem.columns, statistics, problem.scale_T)
        rows.student.add_gradients(
            dlogits_TV, block, 0,
            kept.dhidden if wants.hidden else None, kept.dweight if wants.weight else None,
        )  # fmt: skip
        if wants.bias:
            kept.dbias[: problem.columns] += dlogits_TV.sum(0)
    return losses_T, statistics, kept


def backward(problem: Problem, drows_T: Tensor, statistics: Tensor, wants: Wants) -> Gradients:
    """Projects again; of the head's gradient it holds one slice beside the result."""
    gradients = empty_gradients(problem, wants, problem.dtypes)
    rows = Rows(problem, plan(problem, whole_rows=False))
    scale_T = problem.scale_T * drows_T
    # where the dtypes agree these are the results themselves
    dhidden_TD, dbias_V = gradients.dhidden.to(problem.wide), gradients.dbias.to(problem.wide)
    one_block = len(rows.blocks) == 1 and not rows.student.widens
    # a sum finished in one GEMM is rounded once; one over several blocks is added up in float32
    same = problem.student_weight.dtype == problem.wide or one_block
    for begin, end in rows.slices:
        dslice_VD = gradients.dweight[begin:end]
        if wants.weight and not same:
            dslice_VD = torch.empty_like(dslice_VD, dtype=problem.wide)
        for block in rows.blocks:
            dlogits_TV = rows.gradient(block, begin, end, statistics, scale_T)
            rows.student.add_gradients(
                dlogits_TV, block, begin,
                dhidden_TD if wants.hidden else None, dslice_VD if wants.weight else None,
            )  # fmt: skip
            if wants.bias:
                dbias_V[begin:end] += dlogits_TV.sum(0)
        if wants.weight and not same:
            gradients.dweight[begin:end] = dslice_VD
    return gradients._replace(
        dhidden=dhidden_TD.to(gradients.dhidden.dtype), dbias=dbias_V.to(gradients.dbias.dtype)
    )


class PairHead(Head):
    """bfloat16 factors multiplied as they are, where the processor does that."""

    widens = False

    def project(self, hidden_TD: Tensor, begin: int, end: int, tile_TV: Tensor) -> None:
        bias = None if self.bias is None else self.bias[begin:end].to(self.wide)
        _native.fused_linear_kl_project_bfloat16(hidden_TD, self.weight[begin:end], bias, tile_TV)

    def add_gradients(
        self,
        dlogits_TV: Tensor,
        block: slice,
        begin: int,
        dhidden_TD: Tensor | None,
        dweight_VD: Tensor | None,
    ) -> None:
        first, into_VD = block.start == 0, dweight_VD
        if dweight_VD is not None and dweight_VD.dtype == torch.float16:
            into_VD, first = torch.empty_like(dweight_VD, dtype=self.wide), True
        _native.fused_linear_kl_gradients_bfloat16(
            dlogits_TV,
            self.hidden[block],
            self.weight[begin : begin + dlogits_TV.shape[1]],
            None if dhidden_TD is None else dhidden_TD[block],
            into_VD,
            first,
        )
        if into_VD is not None and dweight_VD is not None and into_VD is not dweight_VD:
            dweight_VD.copy_(into_VD if block.start == 0 else into_VD + dweight_VD)


def head(problem: Problem, side: str, columns: int, tile: tuple[int, int]) -> Head:
    """A side by the GEMM that suits its dtype; pairs need an even width and rows without gaps."""
    weight: Tensor = getattr(problem, f"{side}_weight")
    paired = weight.dtype == torch.bfloat16 and problem.wide == torch.float32
    paired = paired and weight.shape[1] % 2 == 0 and weight.is_contiguous()
    if paired and _native.fused_linear_kl_multiplies_bfloat16(weight):
        return PairHead(problem, side, columns, tile)
    return Head(problem, side, columns, tile)


class Rows:
    """The C++ row kernels on the tiles of one call."""

    def __init__(self, problem: Problem, tile: tuple[int, int]) -> None:
        self.problem, self.T = problem, problem.scale_T.shape[0]
        self.student = head(problem, "student", problem.columns, tile)
        self.teacher = (
            head(problem, "teacher", problem.compared, tile) if problem.compared else None
        )
        self.blocks = [slice(*span) for span in spans(0, self.T, tile[0])]
        self.slices = list(spans(0, problem.columns, tile[1]))
        self.divergence = DIVERGENCES.index(problem.divergence)
        # CE at temperature 1 over the same columns shares the student's normaliser
        shared = problem.temperature == 1 and problem.columns == problem.compared
        self.own_sum = bool(problem.ce_weight) and not shared
        self.labels = None if problem.labels is None else problem.labels.long().contiguous()
        self.there: tuple[int, int] | None = None
        self.tiles: tuple[Tensor, Tensor | None]

    def project(self, block: slice, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Both sides' logits of a tile; once more for the tile that is still there."""
        if self.there != (block.start, begin):
            student_TV = self.student.logits(block, begin, end)
            assert student_TV is not None, "the student has every column of the loss"
            teacher_TV = self.teacher.logits(block, begin, end) if self.teacher else None
            self.there, self.tiles = (block.start, begin), (student_TV, teacher_TV)
        return self.tiles

    def statistics(self, blocks: list[slice]) -> tuple[Tensor, Tensor]:
        """Losses and statistics of the rows of some neighbouring blocks."""
        problem, first = self.problem, blocks[0].start if blocks else 0
        scale_T = problem.scale_T[first : blocks[-1].stop if blocks else 0]
        sums = scale_T.new_zeros((scale_T.shape[0], SUMS), dtype=torch.float64)
        sums[:, [0, 2, 8]] = MISSING
        for begin, end in self.slices:
            for block in blocks:
                tiles, local = (
                    self.project(block, begin, end),
                    slice(block.start - first, block.stop - first),
                )
                _native.fused_linear_kl_accumulate(
                    *tiles, self._labels(block), scale_T[local], sums[local], begin,
                    self.own_sum, self.divergence, problem.temperature,
                )  # fmt: skip
        found = self._finish(sums, scale_T)
        if problem.divergence != "jsd" or not problem.compared:
            return found
        for begin, end in self.slices:
            for block in blocks:
                student_TV, teacher_TV = self.project(block, begin, end)
                local = slice(block.start - first, block.stop - first)
                if teacher_TV is not None:
                    _native.fused_linear_kl_jsd(
                        student_TV, teacher_TV, scale_T[local], found[1][local], sums[local],
                        problem.beta, problem.temperature,
                    )  # fmt: skip
        return self._finish(sums, scale_T)

    def gradient(
        self, block: slice, begin: int, end: int, statistics: Tensor, scale_T: Tensor
    ) -> Tensor:
        """dS of one tile, in the memory of its logits."""
        problem, (student_TV, teacher_TV) = self.problem, self.project(block, begin, end)
        _native.fused_linear_kl_gradient(
            student_TV, teacher_TV, self._labels(block), scale_T[block], statistics[block], begin,
            self.divergence, problem.beta, problem.temperature, problem.kd_scale, problem.ce_weight,
        )  # fmt: skip
        self.there = None
        return student_TV

    def _labels(self, block: slice) -> Tensor | None:
        return None if self.labels is None else self.labels[block]

    def _finish(self, sums: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
        problem = self.problem
        kd_weight = problem.kd_scale if problem.compared else 0.0
        losses_T, statistics = _native.fused_linear_kl_finish(
            sums, scale_T, self.own_sum, self.divergence, problem.beta, kd_weight, problem.ce_weight
        )
        return losses_T, statistics
