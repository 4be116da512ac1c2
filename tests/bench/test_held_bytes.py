"""Memory that our kernels keep beside torch's allocator is counted, and given back."""

import pytest
import torch

from deepfusion_kernels import _native, moe_experts
from deepfusion_kernels.bench.native_impl import held_bytes
from deepfusion_kernels.bench.timing import peak_extra_bytes

LARGE = 4 << 20


def test_a_kept_block_counts_while_it_is_in_use() -> None:
    if not _native.HAS_CPU:
        pytest.skip("built without the native library")
    T, K, E, F, D = 256, 2, 4, 1024, 16
    hidden = torch.randn(T, D, requires_grad=True)
    weights = torch.rand(T, K)
    experts = torch.arange(T * K).view(T, K) % E

    def call() -> torch.Tensor:
        gate_up, down = torch.randn(E, 2 * F, D), torch.randn(E, D, F)
        return moe_experts(hidden, gate_up, down, experts, weights, backend="cpu")

    # [T K, 2 F] in float32, saved for backward: exactly as large as what is kept
    before, _ = held_bytes(restart=True)
    out = call()
    now, most = held_bytes()
    assert now - before == LARGE
    assert most >= now
    del out
    assert held_bytes()[0] == before
    assert held_bytes(restart=True) == (before, before)
    assert peak_extra_bytes(call, torch.device("cpu")) >= LARGE
