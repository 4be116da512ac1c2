"""What Triton's CPU interpreter gets wrong by itself, compared with torch bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels._triton import INTERPRETED, tl, triton

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are not interpreted here")
N = 64


@triton.jit
def _binary_kernel(a_ptr, b_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr) -> None:
    a, b = tl.load(a_ptr + tl.arange(0, N)), tl.load(b_ptr + tl.arange(0, N))
    if OP == "add":
        out = a + b
    elif OP == "mul":
        out = a * b
    elif OP == "div":
        out = (a / b).to(a.dtype)
    else:
        out = tl.where(a < b, a, b)
    tl.store(out_ptr + tl.arange(0, N), out)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr) -> None:
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr + tl.arange(0, N), x.to(out_ptr.dtype.element_ty))


@triton.jit
def _store_kernel(x_ptr, out_ptr, N: tl.constexpr) -> None:
    tl.store(out_ptr + tl.arange(0, N), tl.load(x_ptr + tl.arange(0, N)))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr) -> None:
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _sum_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr) -> None:
    total = 0.0
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32), 0)
    tl.store(out_ptr, total)


@triton.jit
def _scale_kernel(x_ptr, out_ptr, factor, N: tl.constexpr) -> None:
    tl.store(out_ptr + tl.arange(0, N), tl.load(x_ptr + tl.arange(0, N)) * factor)


@triton.autotune(
    configs=[triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 64})], key=["count"]
)
@triton.jit
def _tuned_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < count) + 1.0, mask=at < count)


def same_bits(ours: Tensor, wanted: Tensor) -> bool:
    """Of a NaN only that it is one: torch itself has two."""
    numbers = ~wanted.isnan()
    same = ours[numbers].view(torch.int16) == wanted[numbers].view(torch.int16)
    return bool(same.all()) and torch.equal(ours.isnan(), wanted.isnan())


@pytest.mark.parametrize("op", ["add", "mul", "div", "min"])
def test_bf16_arithmetic(op: str) -> None:
    a, b = (torch.randn(N).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    _binary_kernel[(1,)](a, b, out, OP=op, N=N)
    wanted: dict[str, Tensor] = {"add": a + b, "mul": a * b, "div": a / b, "min": a.minimum(b)}
    assert same_bits(out, wanted[op])


@pytest.mark.parametrize("kernel", [_cast_kernel, _store_kernel], ids=["cast", "store"])
def test_bf16_rounds_to_nearest_even(kernel: Any) -> None:
    x = torch.randn(N) * 100
    x[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), float("nan")])
    out = torch.empty(N, dtype=torch.bfloat16)
    kernel[(1,)](x, out, N=N)
    assert same_bits(out, x.bfloat16())


def test_bf16_widens_exactly() -> None:
    x = torch.randn(N).bfloat16()
    out = torch.empty(N)
    _cast_kernel[(1,)](x, out, N=N)
    assert torch.equal(out, x.float())


def test_bf16_dot() -> None:
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, N=16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_run_time_loop_bound() -> None:
    x, out = torch.randn(53), torch.empty(1)
    _sum_kernel[(1,)](x, out, 53, BLOCK=16)
    torch.testing.assert_close(out[0], x.sum())


def test_a_float_argument_is_float32() -> None:
    x, out = torch.randn(N), torch.empty(N)
    _scale_kernel[(1,)](x, out, 0.1, N=N)
    assert torch.equal(out, x * torch.tensor(0.1))


def test_autotune_takes_the_first_configuration() -> None:
    x, out = torch.randn(53), torch.empty(53)
    _tuned_kernel[lambda meta: (triton.cdiv(53, meta["BLOCK"]),)](x, out, 53)
    assert torch.equal(out, x + 1)
    assert _tuned_kernel.best_config.kwargs == {"BLOCK": 16}
