"""fused_linear_mse's Triton kernel as it is launched: with and without errors, norm, mask."""

from deepfusion_kernels.ops.fused_linear_mse import triton_impl, triton_rows
from tests.aot import Shipped, Types


def _error(name: str, element: str, norm: bool, full: bool) -> Shipped:
    arguments: dict[str, Types] = {
        "products": "*fp32:16",
        "target": (element, "i32:16", "i32:16"),
        "offsets_ptr": "*i32:16",
        "scale_ptr": "*fp32:16",
        "sse_ptr": "*fp32:16",
        "sizes": ("i32", "i32", "i32", "i32:16"),
    }
    if full:
        arguments |= {"bias_ptr": element, "mask_ptr": "*i1:16", "error_ptr": element}
    constants = {
        "NORM": norm,
        "KEEP": full,
        "BLOCK_T": triton_impl.BLOCK_T,
        "BLOCK_M": triton_impl.BLOCK_M,
    }
    return Shipped(name, triton_rows._error_kernel, arguments, constants, triton_impl.LAUNCH)


SHIPPED = (
    _error("error-bf16", "*bf16:16", False, True),
    _error("error-bf16-norm", "*bf16:16", True, True),
    _error("error-fp32-norm", "*fp32:16", True, True),
    _error("error-bf16-plain", "*bf16:16", False, False),
)
