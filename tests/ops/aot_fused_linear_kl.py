"""fused_linear_kl's row kernels as they are launched, from the plainest to the fullest."""

from deepfusion_kernels.ops.fused_linear_kl import triton_impl, triton_rows
from tests.aot import Shipped, Types

TILE = ("*fp32:16", "i32:16")
PAIR: dict[str, Types] = {"student": TILE, "teacher": TILE, "scale_ptr": "*fp32:16"}
FULL: dict[str, Types] = {
    "student_bias_ptr": "*bf16:16",
    "teacher_bias_ptr": "*bf16:16",
    "labels_ptr": "*i64:16",
}
NO_LABELS = {name: kind for name, kind in FULL.items() if name != "labels_ptr"}


def _constants(divergence: int, **more: int) -> dict[str, int]:
    return {"DIVERGENCE": divergence, "BLOCK_V": triton_impl.BLOCK_V[divergence], **more}


def _accumulate(name: str, divergence: int, full: bool) -> Shipped:
    arguments = PAIR | {
        "sums_ptr": "*fp32:16",
        "columns": ("i32", "i32", "i32"),
        "inv_tau": "fp32",
        **(FULL if full else {}),
    }
    constants = _constants(divergence, OWN_SUM=full)
    kernel = triton_rows._accumulate_kernel
    return Shipped(f"accumulate-{name}", kernel, arguments, constants, triton_impl.LAUNCH)


def _gradient(name: str, divergence: int, out: str, full: bool) -> Shipped:
    arguments = PAIR | {
        "stats_ptr": "*fp32:16",
        "gradient": (out, "i32:16"),
        "columns": ("i32", "i32", "i32"),
        "scalars": ("fp32", "fp32", "fp32", "fp32"),
        **(FULL if full else {}),
    }
    kernel, constants = triton_rows._gradient_kernel, _constants(divergence)
    return Shipped(f"gradient-{name}", kernel, arguments, constants, triton_impl.LAUNCH)


def _jsd() -> Shipped:
    arguments = PAIR | {
        "stats_ptr": "*fp32:16",
        "sums_ptr": "*fp32:16",
        "columns": ("i32", "i32"),
        "scalars": ("fp32", "fp32"),
        **NO_LABELS,
    }
    constants = {"BLOCK_V": triton_impl.BLOCK_V[2]}
    return Shipped("jsd", triton_rows._jsd_kernel, arguments, constants, triton_impl.LAUNCH)


def _finish(divergence: int) -> Shipped:
    arguments: dict[str, Types] = {
        "scale_ptr": "*fp32:16",
        "sums_ptr": "*fp32:16",
        "loss_ptr": "*fp32:16",
        "stats_ptr": "*fp32:16",
        "T": "i32",
        "scalars": ("fp32", "fp32", "fp32"),
    }
    constants = {
        "DIVERGENCE": divergence,
        "WITH_KD": True,
        "WITH_CE": True,
        "OWN_SUM": True,
        "BLOCK_T": triton_impl.BLOCK_T,
    }
    launch = triton_impl.FINISH_LAUNCH
    return Shipped(f"finish-{divergence}", triton_rows._finish_kernel, arguments, constants, launch)


SHIPPED = (
    _accumulate("forward_kl", 0, False),
    _accumulate("reverse_kl-full", 1, True),
    _accumulate("jsd-full", 2, True),
    _gradient("forward_kl-bf16", 0, "*bf16:16", False),
    _gradient("reverse_kl-fp32-full", 1, "*fp32:16", True),
    _gradient("jsd-bf16-full", 2, "*bf16:16", True),
    _jsd(),
    _finish(1),
    _finish(2),
)
