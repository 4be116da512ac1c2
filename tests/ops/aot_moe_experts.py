"""moe_experts' kernels as they are launched: each target's tiles, and each way to fetch rows."""

import torch

from deepfusion_kernels.ops.moe_experts import triton_gemm, triton_rows, triton_weights
from deepfusion_kernels.ops.moe_experts.triton_launch import GROUP, LINE, SLOT_BLOCK
from deepfusion_kernels.ops.moe_experts.triton_tiles import (
    AMPERE,
    COPIED,
    FLOAT32,
    HOPPER,
    TARGETS,
    Config,
    Tile,
)
from tests.aot import Shipped, Types

INDEX = "*i32:16"
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class Kernels:
    """The products of one configuration on one target."""

    def __init__(self, name: str, capability: int, config: Config, dtype: torch.dtype) -> None:
        self.name, self.capability, self.config = name, capability, config
        self.dtype, self.exact = NAMES[dtype], dtype == torch.float32
        self.pointer = f"*{self.dtype}:16"
        self.by_tma = config.descriptors

    def matrix(self, lines: int, columns: int, gathered: bool = False) -> Types:
        by_pointer = gathered or not self.by_tma
        return self.pointer if by_pointer else f"tensordesc<{self.dtype}[{lines},{columns}]>"

    def product(
        self, name: str, kernel: object, arguments: dict[str, Types], tile: Tile, **more: object
    ) -> Shipped:
        constants = {
            "DESCRIPTORS": self.by_tma, "PRECISION": "ieee", "BLOCK_M": self.config.rows,
            "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "GROUP": GROUP, **more,
        }  # fmt: skip
        launch = {"num_warps": tile.warps, "num_stages": tile.stages}
        return Shipped(
            f"{name}-{self.name}", kernel, arguments, constants, launch, (self.capability,),
            tensor_cores=not self.exact,
        )  # fmt: skip

    def up(self, activation: int = 0) -> Shipped:
        tile, gathers = self.config.up, self.config.gathers
        arguments: dict[str, Types] = {
            "x": self.matrix(self.config.rows, tile.depth, gathers),
            "w": self.matrix(tile.columns, tile.depth),
            **dict.fromkeys(("order_ptr", "offsets_ptr", "tiles_ptr"), INDEX),
            "h_ptr": self.pointer,
            "a_ptr": self.pointer,
            "sizes": ("i32", "i32:16", "i32:16", "i32"),
        }
        options = {"ACTIVATION": activation, "GATHER": gathers}
        return self.product(f"up{activation}", triton_gemm._up_kernel, arguments, tile, **options)

    def rows(self, name: str) -> Shipped:
        by_row = name == "down"
        tile = self.config.down if by_row else self.config.dx
        block = (tile.columns, tile.depth) if by_row else (tile.depth, tile.columns)
        arguments: dict[str, Types] = {
            "left": self.matrix(self.config.rows, tile.depth),
            "right": self.matrix(*block),
            "offsets_ptr": INDEX,
            "tiles_ptr": INDEX,
            "out_ptr": self.pointer,
            "sizes": ("i32", "i32:16", "i32:16"),
        }
        return self.product(name, triton_gemm._rows_kernel, arguments, tile, BY_ROW=by_row)

    def dact(self, activation: int = 0) -> Shipped:
        tile, gathers = self.config.dact, self.config.gathers
        arguments: dict[str, Types] = {
            "dout": self.matrix(self.config.rows, tile.depth, gathers),
            "w": self.matrix(tile.depth, tile.columns),
            "plan": (INDEX, INDEX),
            "tiles_ptr": INDEX,
            "h_ptr": self.pointer,
            "weights_ptr": "*fp32:16",
            "out": (self.pointer, self.pointer, "*fp32:16"),
            "sizes": ("i32", "i32:16", "i32:16", "i32", "i32"),
        }
        options = {"ACTIVATION": activation, "GATHER": gathers}
        kernel = triton_gemm._dact_kernel
        return self.product(f"dact{activation}", kernel, arguments, tile, **options)

    def dweight(self, name: str) -> Shipped:
        tile, config = self.config.dweight, self.config
        gathers = [config.gathers and name == side for side in ("dw2", "dw1")]
        arguments: dict[str, Types] = {
            "left": self.matrix(tile.depth, config.lines, gathers[0]),
            "right": self.matrix(tile.depth, tile.columns, gathers[1]),
            "order_ptr": INDEX,
            "offsets_ptr": INDEX,
            "dweight_ptr": self.pointer,
            "sizes": ("i32", "i32:16", "i32:16", "i32"),
        }
        options = {
            "GATHER_LEFT": gathers[0], "GATHER_RIGHT": gathers[1], "BLOCK_M": config.lines,
        }  # fmt: skip
        return self.product(name, triton_weights._dweight_kernel, arguments, tile, **options)

    def all(self) -> list[Shipped]:
        return [
            self.up(), self.rows("down"), self.dact(), self.rows("dx"), self.dweight("dw2"),
            self.dweight("dw1"),
        ]  # fmt: skip


def _rows(name: str, arguments: dict[str, Types], **constants: int) -> Shipped:
    kernel = getattr(triton_rows, f"_{name}_kernel")
    return Shipped(name, kernel, arguments, constants, LINE, (80, 120))


BF16 = "*bf16:16"
ROWS = (
    _rows(
        "tile_map", {"offsets_ptr": INDEX, "tiles_ptr": INDEX, "E": "i32", "row_tiles": "i32"},
        BLOCK_M=128, BLOCK_E=1024, BLOCK=128,
    ),
    _rows(
        "gather", {"x_ptr": BF16, "order_ptr": INDEX, "rows_ptr": BF16, "R": "i32",
        "width": "i32:16", "K": "i32"}, BLOCK_R=1, BLOCK_D=2048,
    ),
    _rows(
        "combine", {"rows_ptr": BF16, "slots_ptr": INDEX, "weights_ptr": "*fp32:16",
        "out_ptr": BF16, "T": "i32", "width": "i32:16", "K": "i32"}, BLOCK_T=1, BLOCK_D=2048,
    ),
    _rows(
        "dweights", {"partials_ptr": "*fp32:16", "slots_ptr": INDEX, "dweights_ptr": "*fp32:16",
        "R": "i32", "parts": "i32"}, BLOCK=SLOT_BLOCK,
    ),
)  # fmt: skip


LARGE = [
    kernel
    for capability, configs in TARGETS.items()
    for kernel in Kernels("bf16", capability, configs[0], torch.bfloat16).all()
]
MIDDLE = Kernels("middle", 90, HOPPER[1], torch.bfloat16)
FEW = Kernels("few", 80, AMPERE[2], torch.bfloat16)
FEW_LATER = [Kernels("few", capability, AMPERE[2], torch.bfloat16) for capability in (90, 100)]
SORTED = Kernels("copied", 90, COPIED, torch.bfloat16)
EXACT = Kernels("fp32", 80, FLOAT32, torch.float32)
SHIPPED = (
    *LARGE,
    *ROWS,
    MIDDLE.dact(2),
    FEW.up(1),
    FEW.rows("down"),
    *(kernels.up() for kernels in FEW_LATER),
    SORTED.up(),
    SORTED.dact(1),
    SORTED.dweight("dw1"),
    EXACT.up(),
    EXACT.dweight("dw2"),
)
