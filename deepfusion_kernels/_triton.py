"""Triton if it is installed, stand-ins if not: the only place that imports it."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Absent:
        """Lets kernel files be imported without Triton; nothing in them can be launched."""

        def __getattr__(self, name: str) -> Any:
            return _Absent()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return (
                args[0] if args and callable(args[0]) and not isinstance(args[0], _Absent) else self
            )

    triton = _Absent()
    tl = _Absent()
    TensorDescriptor = _Absent()

# Under the interpreter kernels run on CPU tensors; decided by Triton at its import.
INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)

__all__ = ["HAS_TRITON", "INTERPRETED", "TensorDescriptor", "tl", "triton"]
