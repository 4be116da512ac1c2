"""The stem's Triton kernels as they are launched: tiles by dtype, full of options and plain."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deepfusion_kernels.ops.view_aligned_attention import (
    triton_attention,
    triton_flash,
    triton_patches,
    triton_projection,
    triton_small,
)
from tests.aot import Shipped, Types

BF16, FP32 = "*bf16:16", "*fp32:16"
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def _stages(pointer: str, count: int) -> dict[str, Types]:
    strides = ("i32:16",) * count
    return {"stages": (pointer,) * count, "strides_b": strides, "strides_t": strides}


SIZES: dict[str, Types] = {"sizes": ("i32:16", "i32:16", "i32:16", "i32:16", "i32", "i32:16")}


def _gemm(
    kind: str, name: str, tile: triton_projection.Tile, pointer: str = BF16, positioned: bool = True
) -> Shipped:
    """kind: project, dweight, dstage or unpool; four stages, a mask, the embeddings."""
    (height, width, step), launch = tile
    arguments = {**_stages(pointer, 4), **SIZES, "mask_ptr": "*i1:16", "dx_ptr": pointer}
    constants: dict[str, Any] = {"COUNT": 4}
    if kind == "project":
        kernel = triton_patches._project_kernel
        names = ("weight_ptr", "bias_ptr", "patch_ptr", "stage_ptr", "out_ptr")
        arguments |= dict.fromkeys(names, pointer)
        if not positioned:
            del arguments["patch_ptr"]
        constants |= {"BLOCK_N": height, "BLOCK_D": width, "BLOCK_C": step}
    elif kind == "dweight":
        kernel = triton_patches._dweight_kernel
        arguments["dweight_ptr"] = pointer
        constants |= {"BLOCK_D": height, "BLOCK_C": width, "BLOCK_N": step}
    else:
        kernel = triton_patches._dstage_kernel
        arguments |= {"dstages": (pointer,) * 4, "numbers": ("i32",) * 4, "weight_ptr": pointer}
        if kind == "unpool":
            arguments["offsets_ptr"] = "*i32:16"
        constants |= {"BLOCK_N": height, "BLOCK_C": width, "BLOCK_D": step}
        constants["POOL"] = kind == "unpool"
    taken = {key: kinds for key, kinds in arguments.items() if key in kernel.arg_names}
    return Shipped(f"{kind}-{name}", kernel, taken, constants, launch, tensor_cores=pointer == BF16)


def _pool() -> Shipped:
    arguments = {
        **_stages(BF16, 4),
        "offsets_ptr": "*i32:16",
        "mask_ptr": "*i1:16",
        "out_ptr": BF16,
        "sizes": ("i32:16", "i32:16", "i32:16", "i32:16"),
    }
    constants = {
        "COUNT": 4,
        "BLOCK_T": triton_projection.POOL_TOKENS,
        "BLOCK_C": triton_projection.POOL_COLUMNS,
    }
    launch = triton_projection.POOL_LAUNCH
    return Shipped("pool-bf16", triton_patches._pool_kernel, arguments, constants, launch)


def _attention(
    kernel: Any, name: str, pointer: str, constants: Mapping[str, Any], launch: Mapping[str, int]
) -> Shipped:
    pointers = ("qkv_ptr", "dqkv_ptr", "dy_ptr", "y_ptr", "weight_ptr", "bias_ptr")
    statistics = ("lse_ptr", "delta_ptr", "upstream_ptr")
    arguments: dict[str, Types] = {
        **dict.fromkeys(pointers, pointer),
        **dict.fromkeys(statistics, FP32),
        "valid_ptr": "*i1:16",
        "features": (pointer, "i32:16", "i32:16", "i32:16"),
        "sizes": ("i32", "i32", "i32", "i32"),
        "scale": "fp32",
    }
    taken = {key: kinds for key, kinds in arguments.items() if key in kernel.arg_names}
    return Shipped(name, kernel, taken, constants, launch, tensor_cores=pointer == BF16)


def _flash(kind: str, head_size: int, pointer: str, masked: bool = True) -> Shipped:
    kernel = getattr(triton_flash, f"_flash_{kind}_kernel")
    tile = triton_attention.flash_launch(kind, head_size, 2 if pointer == BF16 else 4)
    launch = {key: tile[key] for key in OPTIONS}
    blocks = {key: value for key, value in tile.items() if key not in OPTIONS}
    constants = {**blocks, "CAUSAL": masked, "MASKED": masked}
    name = f"flash-{kind}-{head_size}-{pointer[1:5]}-{'masked' if masked else 'plain'}"
    return _attention(kernel, name, pointer, constants, launch)


def _small(kind: str, patches: int, head_size: int, pointer: str) -> Shipped:
    kernel = getattr(triton_small, f"_small_{kind}_kernel")
    constants = {"CAUSAL": True, "E": head_size, "BLOCK_P": patches}
    if kind == "forward":
        constants["BLOCK_C"] = triton_attention.SMALL_COLUMNS
    else:
        constants["BLOCK_M"] = triton_attention.small_queries(patches)
    launch = triton_attention.small_launch(patches, 2 if pointer == BF16 else 4)
    name = f"small-{kind}-{patches}-{head_size}-{pointer[1:5]}"
    return _attention(kernel, name, pointer, constants, launch)


def _on(shipped: Shipped, *targets: int) -> Shipped:
    """A variant of a kernel that is compiled for all: sm_90 and the one of least shared memory."""
    return replace(shipped, targets=targets or (90, 120))


SHIPPED = (
    *(
        _gemm(kind, "wide", triton_projection.WIDE, positioned=False)
        for kind in ("project", "dweight", "dstage")
    ),
    *(_flash(kind, 64, BF16) for kind in ("forward", "dkv", "dq")),
    *(_small(kind, 128, 64, BF16) for kind in ("forward", "backward")),
    _on(_pool()),
    _on(_gemm("project", "medium", triton_projection.MEDIUM)),
    _on(_gemm("unpool", "medium", triton_projection.MEDIUM)),
    _on(_gemm("project", "narrow", triton_projection.NARROW)),
    # sm_100 is where float32 might turn into TF32
    _on(_gemm("project", "fp32", triton_projection.FLOAT32, FP32), 90, 100),
    _on(_flash("dkv", 128, BF16)),
    _on(_flash("dkv", 128, FP32)),
    _on(_small("forward", 32, 64, FP32)),
)
