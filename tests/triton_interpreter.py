"""Makes Triton's CPU interpreter agree with the GPU where it does not: import before any kernel.

The interpreter holds bfloat16 as raw uint16: arithmetic on it is silently wrong and a cast
truncates. Here it is widened to float32 for each operation and rounded to nearest even on the way
back. NOTE: private names of triton 3.6.0.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import TensorHandle

Array = NDArray[Any]

original_cast = Builder.cast_impl
original_fp_to_fp = Builder.create_fp_to_fp
original_dot = Builder.create_dot
original_convert = interpreter._implicit_cvt
original_patch = interpreter._patch_lang_tensor
original_init = Autotuner.__init__


def widen(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Array) -> Array:
    """float32 to the bits of bfloat16, to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bf16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def as_float32(handle: Any) -> Any:
    return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def cast_impl(self: Any, source: Any, target: Any) -> Any:
    if target.scalar == tl.bfloat16 and not is_bf16(source):
        return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
    if is_bf16(source) and target.scalar != tl.bfloat16:
        values = widen(source.data).astype(interpreter._get_np_dtype(target))
        return TensorHandle(values, target.scalar)
    return original_cast(self, source, target)


def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    if target.scalar == tl.bfloat16 and source.dtype.scalar in (tl.float32, tl.float16):
        return cast_impl(self, source, target)
    return original_fp_to_fp(self, source, target, rounding)


def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return original_dot(self, as_float32(a), as_float32(b), *rest)


def get_bf16(self: Any, value: float) -> Any:
    return TensorHandle(narrow(np.array([value], np.float32)), tl.bfloat16)


def through_float32(original: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, *handles: Any) -> Any:
        result = original(self, *map(as_float32, handles))
        back = any(map(is_bf16, handles)) and result.dtype.scalar == tl.float32
        return TensorHandle(narrow(result.data), tl.bfloat16) if back else result

    return operation


def implicit_convert(value: Any) -> Any:
    """A float argument is a float32 tensor, as on the GPU."""
    if type(value) is not float:
        return original_convert(value)
    return tl.core.tensor(TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)


def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
    """numpy >= 2.4: a run-time loop bound must offer __index__."""
    original_patch(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


def init_autotuner(self: Any, *args: Any, **kwargs: Any) -> None:
    """Nothing to time here: the first configuration is taken."""
    original_init(self, *args, **kwargs)
    self._do_bench = lambda call, quantiles=None: [1.0, 1.0, 1.0]
    self.configs = self.configs[:1]


FLOAT_OPS = ("f", "min", "max", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "erf", "ceil", "abs")
FLOAT_CREATES = tuple(f"create_{op}" for op in (*FLOAT_OPS, "precise"))
NO_ARITHMETIC = ("create_fp", "create_fence", "create_full")

Builder.cast_impl = cast_impl
Builder.create_fp_to_fp = create_fp_to_fp
Builder.create_dot = create_dot
Builder.get_bf16 = get_bf16
for name in dir(Builder):
    if name.startswith(FLOAT_CREATES) and not name.startswith(NO_ARITHMETIC):
        setattr(Builder, name, through_float32(getattr(Builder, name)))
interpreter._implicit_cvt = implicit_convert
interpreter._patch_lang_tensor = patch_lang_tensor
Autotuner.__init__ = init_autotuner
