"""Memory that our kernels keep beside torch's allocator is counted, and given back."""

import resource
from pathlib import Path

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


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc: memory is not told")
def test_calls_of_many_sizes_keep_a_few_blocks() -> None:
    if not _native.HAS_CPU:
        pytest.skip("built without the native library")
    E, F, D = 2, 1024, 16
    gate_up, down = torch.randn(E, 2 * F, D), torch.randn(E, D, F)

    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def call(tokens: int) -> None:
        hidden = torch.randn(tokens, D, requires_grad=True)
        experts = torch.arange(tokens)[:, None] % E
        moe_experts(hidden, gate_up, down, experts, torch.ones(tokens, 1), backend="cpu")

    call(1024)
    before = mapped()
    # 64 sizes from 4 to 8 MiB, 378 MiB in all
    for tokens in range(512, 1024, 8):
        call(tokens)
    assert mapped() - before < 64 << 20
