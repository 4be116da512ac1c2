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
# of them the maxima of student, teacher, and student at temperature 1
MAXIMA = [0, 2, 8]
# and what the second sweep of jsd adds
MEANS = [11, 12]
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


def backward(
    problem: Problem, drows_T: Tensor, statistics: Tensor, wants: Wants, first_column: int = 0
) -> Gradients:
    """Projects again; of the head's gradient it holds one slice beside the result."""
    gradients = empty_gradients(problem, wants, problem.dtypes)
    rows = Rows(problem, plan(problem, whole_rows=False), first_column)
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


class PackedHead(Head):
    """Factors multiplied as they are, float32 or pairs of bfloat16, by our own GEMMs."""

    widens = False

    def project(self, hidden_TD: Tensor, begin: int, end: int, tile_TV: Tensor) -> None:
        bias = None if self.bias is None else self.bias[begin:end].to(self.wide)
        _native.fused_linear_kl_project(hidden_TD, self.weight[begin:end], bias, tile_TV)

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
        _native.fused_linear_kl_gradients(
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
    """A side by the GEMM that suits its dtype; bfloat16 pairs need an even width."""
    weight: Tensor = getattr(problem, f"{side}_weight")
    packs = problem.wide == torch.float32 and weight.is_contiguous()
    packs = packs and (weight.dtype == torch.float32 or weight.shape[1] % 2 == 0)
    if packs and _native.fused_linear_kl_multiplies(weight):
        return PackedHead(problem, side, columns, tile)
    return Head(problem, side, columns, tile)


class Rows:
    """The C++ row kernels on the tiles of one call; first_column is where this shard begins."""

    def __init__(self, problem: Problem, tile: tuple[int, int], first_column: int = 0) -> None:
        self.problem, self.T, self.first_column = problem, problem.scale_T.shape[0], first_column
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
        scale_T = self.problem.scale_T[_covered(blocks)]
        sums = self.sums(blocks)
        found = self.finish(sums, scale_T)
        if self.problem.divergence != "jsd" or not self.problem.compared:
            return found
        self.add_jsd(blocks, found[1], sums)
        return self.finish(sums, scale_T)

    def sums(self, blocks: list[slice]) -> Tensor:
        """Partial sums [rows, 13] in float64; csrc/fused_linear_kl names them."""
        problem, covered = self.problem, _covered(blocks)
        sums = problem.scale_T.new_zeros((covered.stop - covered.start, SUMS), dtype=torch.float64)
        sums[:, MAXIMA] = MISSING
        for begin, end in self.slices:
            for block in blocks:
                tiles, local = self.project(block, begin, end), _within(block, covered)
                _native.fused_linear_kl_accumulate(
                    *tiles, self._labels(block), problem.scale_T[block], sums[local],
                    self.first_column + begin, self.own_sum, self.divergence, problem.temperature,
                )  # fmt: skip
        return sums

    def add_jsd(self, blocks: list[slice], statistics: Tensor, sums: Tensor) -> None:
        """The second sweep: what jsd sums once the normalisers are known."""
        problem, covered = self.problem, _covered(blocks)
        for begin, end in self.slices:
            for block in blocks:
                student_TV, teacher_TV = self.project(block, begin, end)
                local = _within(block, covered)
                if teacher_TV is not None:
                    _native.fused_linear_kl_jsd(
                        student_TV, teacher_TV, problem.scale_T[block], statistics[local],
                        sums[local], problem.beta, problem.temperature,
                    )  # fmt: skip

    def finish(self, sums: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [rows] times their scale and statistics [rows, 8]."""
        problem = self.problem
        kd_weight = problem.kd_scale if problem.compared else 0.0
        losses_T, statistics = _native.fused_linear_kl_finish(
            sums, scale_T, self.own_sum, self.divergence, problem.beta, kd_weight, problem.ce_weight
        )
        return losses_T, statistics

    def gradient(
        self, block: slice, begin: int, end: int, statistics: Tensor, scale_T: Tensor
    ) -> Tensor:
        """dS of one tile, in the memory of its logits."""
        problem, (student_TV, teacher_TV) = self.problem, self.project(block, begin, end)
        _native.fused_linear_kl_gradient(
            student_TV, teacher_TV, self._labels(block), scale_T[block], statistics[block],
            self.first_column + begin, self.divergence, problem.beta, problem.temperature,
            problem.kd_scale, problem.ce_weight,
        )  # fmt: skip
        self.there = None
        return student_TV

    def _labels(self, block: slice) -> Tensor | None:
        return None if self.labels is None else self.labels[block]


def _covered(blocks: list[slice]) -> slice:
    """The rows of neighbouring blocks."""
    return slice(blocks[0].start, blocks[-1].stop) if blocks else slice(0, 0)


def _within(block: slice, covered: slice) -> slice:
    return slice(block.start - covered.start, block.stop - covered.start)
