"""Launches of the Triton kernels of moe_experts: one method each, on the tensors of one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._triton import TensorDescriptor, triton
from ..shared.gated_activation import ACTIVATIONS
from .triton_gemm import _dact_kernel, _rows_kernel, _up_kernel
from .triton_rows import _combine_kernel, _dweights_kernel, _gather_kernel, _tile_map_kernel
from .triton_tiles import Config, Tile, choose, describe
from .triton_weights import _dweight_kernel

# row tiles that share a strip of weights; not measured
GROUP = 8
# elements of a program that copies or sums rows
ROW_BLOCK = 2048
SLOT_BLOCK = 256
LINE = {"num_warps": 4}


class Shape(NamedTuple):
    """R routed rows of T tokens with K choices each, E experts of widths D and F."""

    T: int
    K: int
    E: int
    D: int
    F: int

    @property
    def R(self) -> int:
        return self.T * self.K


class Launcher:
    """One call's plan, tile map and configuration."""

    def __init__(self, gate_up_proj: Tensor, activation: str, plan: tuple[Tensor, ...]) -> None:
        self.order, self.slots, self.offsets = plan
        E, F2, D = gate_up_proj.shape
        T, K = self.slots.shape
        self.shape = Shape(T, K, E, D, F2 // 2)
        self.config: Config = choose(gate_up_proj.device, gate_up_proj.dtype, self.shape.R, E)
        self.activation = ACTIVATIONS.index(activation)
        self.precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
        self.capability, self.multiprocessors = describe(gate_up_proj.device)
        self.row_tiles = self.shape.R // self.config.rows + min(E, self.shape.R)
        self.tiles = self._tile_map()

    def _tile_map(self) -> Tensor:
        """Expert and first row of every row tile; its length is known without the offsets."""
        E = self.shape.E
        tiles = self.offsets.new_empty(2, self.row_tiles)
        _tile_map_kernel[(E + 1,)](
            self.offsets, tiles, E, self.row_tiles, BLOCK_M=self.config.rows,
            BLOCK_E=triton.next_power_of_2(E), BLOCK=128, **LINE,
        )  # fmt: skip
        return tiles

    def _options(self, tile: Tile, total: int) -> tuple[tuple[int], dict[str, Any]]:
        """Grid and constants of a product whose tiles are `total`."""
        grid = (max(1, min(total, self.multiprocessors * tile.programs)),)
        constants = {
            "PRECISION": self.precision, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth,
            "GROUP": GROUP, "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip
        return grid, constants

    def _products(self, tile: Tile, columns: int) -> tuple[tuple[int], dict[str, Any]]:
        total = self.row_tiles * triton.cdiv(columns, tile.columns)
        grid, constants = self._options(tile, total)
        return grid, constants | {"BLOCK_M": self.config.rows}

    def _by_descriptor(self, *matrices: Tensor, depth: int = 0, block: int = 1) -> bool:
        """Whether TMA can fetch these matrices.

        A last block of weights that reaches past its expert is refused: zeros times the next
        expert's NaN would reach the sum.
        """
        has_tma = self.capability >= (9, 0) or self.tiles.device.type == "cpu"
        aligned = all(
            each.data_ptr() % 16 == 0 == each.stride(0) * each.element_size() % 16
            for each in matrices
        )
        return self.config.descriptors and has_tma and aligned and depth % block == 0

    def copied(self, x: Tensor) -> Tensor:
        """Rows in expert order, where the configuration does not gather them in the products."""
        if self.config.gathers:
            return x
        R, width = self.shape.R, x.shape[1]
        rows = x.new_empty(R, width)
        block = min(ROW_BLOCK, triton.next_power_of_2(width))
        lines = max(1, ROW_BLOCK // block)
        grid = (triton.cdiv(R, lines), triton.cdiv(width, block))
        _gather_kernel[grid](
            x, self.order, rows, R, width, self.shape.K, BLOCK_R=lines, BLOCK_D=block, **LINE
        )
        return rows

    def up(self, x: Tensor, gate_up_proj: Tensor) -> tuple[Tensor, Tensor]:
        """h [R, 2F] and a [R, F]."""
        _, K, E, D, F = self.shape
        h, a = x.new_empty(self.shape.R, 2 * F), x.new_empty(self.shape.R, F)
        tile, gathers = self.config.up, self.config.gathers
        weights: Any = gate_up_proj.view(E * 2 * F, D)
        by_tma = self._by_descriptor(weights, x)
        rows: Any = x
        if by_tma:
            weights = TensorDescriptor.from_tensor(weights, [tile.columns, tile.depth])
            rows = x if gathers else described(x, self.config.rows, tile.depth)
        grid, constants = self._products(tile, F)
        _up_kernel[grid](
            rows, weights, self.order, self.offsets, self.tiles, h, a, (self.row_tiles, F, D, K),
            ACTIVATION=self.activation, GATHER=gathers, DESCRIPTORS=by_tma, **constants,
        )  # fmt: skip
        return h, a

    def rows(self, left: Tensor, projection: Tensor, by_row: bool, tile: Tile) -> Tensor:
        """left W^T where the projection's rows are columns of the result, else left W."""
        R, depth = left.shape
        N = projection.shape[1 if by_row else 2]
        out = left.new_empty(R, N)
        weights: Any = projection.flatten(0, 1)
        by_tma = self._by_descriptor(left, weights, depth=0 if by_row else depth, block=tile.depth)
        rows: Any = left
        if by_tma:
            block = [tile.columns, tile.depth] if by_row else [tile.depth, tile.columns]
            weights = described(weights, *block)
            rows = described(left, self.config.rows, tile.depth)
        grid, constants = self._products(tile, N)
        _rows_kernel[grid](
            rows, weights, self.offsets, self.tiles, out, (self.row_tiles, N, depth),
            BY_ROW=by_row, DESCRIPTORS=by_tma, **constants,
        )  # fmt: skip
        return out

    def dact(
        self,
        dout: Tensor,
        down_proj: Tensor,
        h: Tensor,
        weights: Tensor,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The wanted ones of dh [R, 2F], a' [R, F], partial sums of dw."""
        _, K, E, D, F = self.shape
        R, tile, gathers = self.shape.R, self.config.dact, self.config.gathers
        dh = torch.empty_like(h) if needs[0] else None
        weighted = h.new_empty(R, F) if needs[1] else None
        parts = triton.cdiv(F, tile.columns)
        partials = h.new_empty(parts, R, dtype=torch.float32) if needs[2] else None
        projection: Any = down_proj.view(E * D, F)
        by_tma = self._by_descriptor(projection, dout, depth=D, block=tile.depth)
        rows: Any = dout
        if by_tma:
            projection = described(projection, tile.depth, tile.columns)
            rows = dout if gathers else described(dout, self.config.rows, tile.depth)
        grid, constants = self._products(tile, F)
        _dact_kernel[grid](
            rows, projection, (self.order, self.offsets), self.tiles, h, weights,
            (dh, weighted, partials), (self.row_tiles, F, D, K, R), ACTIVATION=self.activation,
            GATHER=gathers, DESCRIPTORS=by_tma, **constants,
        )  # fmt: skip
        return dh, weighted, partials

    def dweight(self, left: Tensor, right: Tensor, gathered: str, like: Tensor) -> Tensor:
        """sum over an expert's rows of left right^T; `gathered` names the factor without order."""
        E, M, N = like.shape
        out, tile = torch.empty_like(like), self.config.dweight
        by_tma = self._by_descriptor(left, right)
        factors: list[Any] = [left, right]
        gathers = [self.config.gathers and gathered == side for side in ("left", "right")]
        if by_tma:
            blocks = (self.config.lines, tile.columns)
            factors = [
                each if gathers_it else described(each, tile.depth, block)
                for each, gathers_it, block in zip(factors, gathers, blocks, strict=True)
            ]
        total = E * triton.cdiv(M, self.config.lines) * triton.cdiv(N, tile.columns)
        grid, constants = self._options(tile, total)
        _dweight_kernel[grid](
            *factors, self.order, self.offsets, out, (E, M, N, self.shape.K),
            GATHER_LEFT=gathers[0], GATHER_RIGHT=gathers[1], DESCRIPTORS=by_tma,
            BLOCK_M=self.config.lines, **constants,
        )  # fmt: skip
        return out

    def combine(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Each token's rows, weighted if weights are given, summed with k ascending."""
        T, K = self.slots.shape
        width = rows.shape[1]
        out = rows.new_empty(T, width)
        block = min(ROW_BLOCK, triton.next_power_of_2(width))
        lines = max(1, ROW_BLOCK // block)
        grid = (triton.cdiv(T, lines), triton.cdiv(width, block))
        _combine_kernel[grid](
            rows, self.slots, weights, out, T, width, K, BLOCK_T=lines, BLOCK_D=block, **LINE
        )
        return out

    def dweights(self, partials: Tensor, like: Tensor) -> Tensor:
        out = like.new_empty(like.shape)
        parts, R = partials.shape
        _dweights_kernel[(triton.cdiv(R, SLOT_BLOCK),)](
            partials, self.slots, out, R, parts, BLOCK=SLOT_BLOCK, **LINE
        )
        return out


def described(matrix: Tensor, lines: int, columns: int) -> Any:
    return TensorDescriptor.from_tensor(matrix, [lines, columns])
