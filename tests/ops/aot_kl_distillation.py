"""kl_distillation's Triton kernels as they are launched, from the plainest to the fullest."""

from deepfusion_kernels.ops.kl_distillation import triton_impl, triton_rows
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
        "columns": ("i32", "i32", "i32"),
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
)
