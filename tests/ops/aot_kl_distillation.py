"""kl_distillation's Triton kernels as they are launched, from the plainest to the fullest."""

from deepfusion_kernels.ops.kl_distillation import triton_impl, triton_rows, triton_split
from tests.aot import Shipped, Types

BF16_ROWS = ("*bf16:16", "i32", "i64:16", "i64:16")
FP32_ROWS = ("*fp32:16", "i32", "i64", "i64")
SCALARS = ("fp32", "fp32", "fp32", "fp32", "fp32")


def _block(divergence: int, capped: bool) -> int:
    return triton_impl.CAPPED_BLOCK_V if capped else triton_impl.BLOCK_V[divergence]


def _forward(name: str, rows: Types, divergence: int, full: bool, capped: bool = False) -> Shipped:
    arguments: dict[str, Types] = {
        "student": rows,
        "teacher": rows,
        "loss_ptr": "*fp32:16",
        "stats_ptr": "*fp32:16",
        "columns": ("i32", "i32"),
        "scalars": SCALARS,
    }
    if full:
        arguments |= {"labels_ptr": "*i64:16", "keep_ptr": "*i1:16"}
    constants = {
        "DIVERGENCE": divergence,
        "OWN_SUM": full,
        "CAPPED": capped,
        "BLOCK_V": _block(divergence, capped),
    }
    kernel = triton_rows._kl_forward_kernel
    return Shipped(f"forward-{name}", kernel, arguments, constants, triton_impl.LAUNCH)


def _backward(name: str, rows: Types, divergence: int, full: bool, capped: bool = False) -> Shipped:
    gradient = rows[0]
    arguments: dict[str, Types] = {
        "dloss_ptr": "*fp32:16",
        "student": rows,
        "teacher": rows,
        "stats_ptr": "*fp32:16",
        "dstudent_ptr": gradient,
        "columns": ("i32", "i32", "i32", "i32"),
        "scalars": SCALARS,
    }
    if full:
        arguments |= {"labels_ptr": "*i64:16", "keep_ptr": "*i1:16", "dteacher_ptr": gradient}
    constants = {
        "DIVERGENCE": divergence,
        "CAPPED": capped,
        "BLOCK_V": _block(divergence, capped),
    }
    kernel = triton_rows._kl_backward_kernel
    return Shipped(f"backward-{name}", kernel, arguments, constants, triton_impl.LAUNCH)


def _partial(name: str, rows: Types, divergence: int, full: bool, capped: bool) -> Shipped:
    arguments: dict[str, Types] = {
        "student": rows,
        "teacher": rows,
        "partial_ptr": "*fp32:16",
        "columns": ("i32", "i32"),
        "span": "i32:16",
        "scalars": SCALARS,
    }
    if full:
        arguments |= {"keep_ptr": "*i1:16"}
    constants = {
        "DIVERGENCE": divergence,
        "OWN_SUM": full,
        "CAPPED": capped,
        "BLOCK_V": _block(divergence, capped),
    }
    kernel = triton_split._kl_partial_kernel
    return Shipped(f"partial-{name}", kernel, arguments, constants, triton_impl.LAUNCH)


def _merge(divergence: int) -> Shipped:
    arguments: dict[str, Types] = {
        "student": BF16_ROWS,
        "labels_ptr": "*i64:16",
        "keep_ptr": "*i1:16",
        "partial_ptr": "*fp32:16",
        "loss_ptr": "*fp32:16",
        "stats_ptr": "*fp32:16",
        "V_s": "i32",
        "segments": "i32",
        "scalars": SCALARS,
    }
    constants = {"WITH_KD": True, "DIVERGENCE": divergence, "CAPPED": True}
    kernel = triton_split._kl_merge_kernel
    return Shipped(f"merge-{divergence}", kernel, arguments, constants, triton_impl.MERGE_LAUNCH)


def _jsd_partial(capped: bool) -> Shipped:
    arguments: dict[str, Types] = {
        "student": BF16_ROWS,
        "teacher": BF16_ROWS,
        "keep_ptr": "*i1:16",
        "partial_ptr": "*fp32:16",
        "stats_ptr": "*fp32:16",
        "V": "i32",
        "span": "i32:16",
        "scalars": SCALARS,
    }
    constants = {"CAPPED": capped, "BLOCK_V": _block(2, capped)}
    kernel = triton_split._jsd_partial_kernel
    return Shipped(f"jsd-partial-{capped}", kernel, arguments, constants, triton_impl.LAUNCH)


SHIPPED = (
    _forward("forward_kl-bf16", BF16_ROWS, 0, False),
    _forward("reverse_kl-fp32-full", FP32_ROWS, 1, True),
    _forward("jsd-bf16-full", BF16_ROWS, 2, True),
    _backward("forward_kl-bf16", BF16_ROWS, 0, False),
    _backward("reverse_kl-fp32-full", FP32_ROWS, 1, True),
    _backward("jsd-bf16-full", BF16_ROWS, 2, True),
    _forward("jsd-bf16-full-capped", BF16_ROWS, 2, True, True),
    _backward("jsd-bf16-full-capped", BF16_ROWS, 2, True, True),
    _backward("reverse_kl-fp32-full-capped", FP32_ROWS, 1, True, True),
    _partial("forward_kl-bf16", BF16_ROWS, 0, False, False),
    _partial("reverse_kl-fp32-full-capped", FP32_ROWS, 1, True, True),
    _partial("jsd-bf16-full", BF16_ROWS, 2, True, False),
    _merge(0),
    _merge(1),
    _jsd_partial(False),
    _jsd_partial(True),
)
