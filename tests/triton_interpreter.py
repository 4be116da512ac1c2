"""Makes Triton's CPU interpreter agree with the GPU where it does not: import before any kernel.

The interpreter holds bfloat16 as raw uint16: arithmetic on it is silently wrong and a cast truncates. Here it is widened
to float32 for each operation and rounded to nearest even on the way back. NOTE: private names of triton 3.6.0.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import TensorHandle

cast, fp_to_fp, dot = Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot
convert, patch, init = interpreter._implicit_cvt, interpreter._patch_lang_tensor, Autotuner.__init__

def widen(bits): return (bits.astype(np.uint32) << 16).view(np.float32)
def is_bf16(handle): return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16
def as_float32(handle): return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle

def narrow(values):
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

def cast_impl(self, source, target):
    if target.scalar == tl.bfloat16 and not is_bf16(source):
        return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
    if is_bf16(source) and target.scalar != tl.bfloat16:
        return TensorHandle(widen(source.data).astype(interpreter._get_np_dtype(target)), target.scalar)
    return cast(self, source, target)

def create_fp_to_fp(self, source, target, rounding):
    to_bf16 = target.scalar == tl.bfloat16 and source.dtype.scalar in (tl.float32, tl.float16)
    return cast_impl(self, source, target) if to_bf16 else fp_to_fp(self, source, target, rounding)

def through_float32(original):
    def operation(self, *handles):
        result = original(self, *map(as_float32, handles))
        back = any(map(is_bf16, handles)) and result.dtype.scalar == tl.float32
        return TensorHandle(narrow(result.data), tl.bfloat16) if back else result
    return operation

Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
Builder.create_dot = lambda self, a, b, *rest: dot(self, as_float32(a), as_float32(b), *rest)
Builder.get_bf16 = lambda self, value: TensorHandle(narrow(np.array([value], np.float32)), tl.bfloat16)
FLOAT_OPS = tuple(f"create_{op}" for op in "f min max exp log sqrt rsqrt sin cos erf ceil abs precise".split())
for name in dir(Builder):
    if name.startswith(FLOAT_OPS) and not name.startswith(("create_fp", "create_fence", "create_full")):
        setattr(Builder, name, through_float32(getattr(Builder, name)))

def implicit_convert(value):                               # a float argument is a float32 tensor, as on the GPU
    if type(value) is not float:
        return convert(value)
    return tl.core.tensor(TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)

def patch_lang_tensor(tensor, *scope):                     # numpy >= 2.4: a run-time loop bound must offer __index__
    patch(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())

def init_autotuner(self, *args, **kwargs):                 # nothing to time here: the first configuration is taken
    init(self, *args, **kwargs)
    self._do_bench, self.configs = lambda call, quantiles=None: [1.0, 1.0, 1.0], self.configs[:1]

interpreter._implicit_cvt, interpreter._patch_lang_tensor = implicit_convert, patch_lang_tensor
Autotuner.__init__ = init_autotuner
