"""topk_kl's Triton kernels as they are launched, from the plainest to the fullest."""

from deepfusion_kernels.ops.topk_kl import triton_impl, triton_logprobs
from tests.aot import Shipped, Types

BF16_ROWS = ("*bf16:16", "i32", "i64:16", "i64:16")
FP32_ROWS = ("*fp32:16", "i32", "i64", "i64")
TEACHER = ("*i64:16", "*fp32:16", "i32")
SCALARS = ("fp32", "fp32", "fp32", "fp32")


def _arguments(rows: Types, full: bool) -> dict[str, Types]:
    arguments: dict[str, Types] = {
        "student": rows,
        "teacher": TEACHER,
        "scale_ptr": "*fp32:16",
        "stats_ptr": "*fp32:16",
        "V": "i32",
        "scalars": SCALARS,
    }
    return arguments | ({"labels_ptr": "*i64:16"} if full else {})


def _constants(tail: int, divergence: int, K: int) -> dict[str, int]:
    return {
        "TAIL": tail,
        "DIVERGENCE": divergence,
        "BLOCK_K": K,
        "BLOCK_V": triton_impl.BLOCK_V,
    }


def _forward(name: str, rows: Types, kind: tuple[int, int, int], full: bool) -> Shipped:
    arguments = _arguments(rows, full) | {"rows_ptr": "*fp32:16"}
    constants = _constants(*kind) | {"OWN_SUM": full}
    kernel = triton_impl._topk_forward_kernel
    return Shipped(f"forward-{name}", kernel, arguments, constants, triton_impl.LAUNCH)


def _backward(name: str, rows: Types, kind: tuple[int, int, int], full: bool) -> Shipped:
    arguments = _arguments(rows, full) | {"drows_ptr": "*fp32:16", "dstudent_ptr": rows[0]}
    kernel = triton_impl._topk_backward_kernel
    return Shipped(f"backward-{name}", kernel, arguments, _constants(*kind), triton_impl.LAUNCH)


KINDS = {
    "bucket-forward_kl-K64-bf16": (BF16_ROWS, (0, 0, 64), False),
    "bucket-jsd-K256-fp32-full": (FP32_ROWS, (0, 2, 256), True),
    "zero-K16-bf16": (BF16_ROWS, (1, 0, 16), False),
    "renormalize-reverse_kl-K256-bf16-full": (BF16_ROWS, (2, 1, 256), True),
}
LOG_SUM: dict[str, Types] = {
    "logits_ptr": "*bf16:16",
    "stride_t": "i32:16",
    "max_ptr": "*fp32:16",
    "log_sum_ptr": "*fp32:16",
    "V": "i32",
    "inv_tau": "fp32",
}
SHIPPED = (
    *(make(name, *kind) for name, kind in KINDS.items() for make in (_forward, _backward)),
    Shipped(
        "log_sum-bf16",
        triton_logprobs._log_sum_kernel,
        LOG_SUM,
        {"BLOCK_V": triton_logprobs.BLOCK_V},
        triton_logprobs.LAUNCH,
    ),
)
