"""Patch projection, attention and loss in CUDA C++, run on the host (tests/cuda_on_host.py).

The tests are those of test_vaa_triton.py and test_fused_linear_mse.py: imported, they take this
module's fixtures.
"""

from collections.abc import Iterator

import pytest
import torch

from deepfusion_kernels import fused_linear_mse, view_aligned_attention
from deepfusion_kernels.ops.fused_linear_mse import native_cuda as loss_impl
from deepfusion_kernels.ops.shared import patches
from deepfusion_kernels.ops.view_aligned_attention import native_cuda
from tests import cuda_on_host
from tests.nn.alignment_variants import run
from tests.ops.test_vaa_triton import (  # noqa: F401
    check,
    small,
    test_joined_loss_in_half_precision,
    test_joined_loss_within_budget,
    test_nothing_to_compare_is_zero,
    test_only_wanted_gradients,
    test_right_padding_and_a_masked_sample,
    test_strided_and_expanded_stages_and_repeats,
    test_tails_and_stages,
    test_tokens_outside_every_segment_get_zero,
)

STEM = "view_aligned_attention"
BACKENDS = ("cuda",)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    cuda_on_host.serve(monkeypatch, native_cuda, loss_impl)
    yield "cuda"
    cuda_on_host.set_schedule(0)


def test_several_chunks_of_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows pass by 3; their weight's gradient is summed in float32."""
    monkeypatch.setattr(native_cuda, "CHUNK_BYTES", 0)
    monkeypatch.setattr(native_cuda, "LEAST_ROWS", 3)
    for dtype in (torch.float32, torch.bfloat16):
        check(small("conv-causal-left", dtype, T=14), backend)


@pytest.mark.parametrize("H", (8, 9))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_patches_are_packed_and_put_back(dtype: torch.dtype, H: int, backend: str) -> None:
    """16 bytes at once where tokens allow it, else an element: exactly the masked tokens."""
    ops = torch.ops.deepfusion_on_host
    whole = torch.randn(2, 9, 24).to(dtype)
    mask, offsets = torch.rand(2, 7) > 0.4, patches.even_offsets(2, 7, 3, whole.device)
    for stage in (whole[:, 1:8, :H], whole[:, 1:8, 8 : 8 + H]):
        kept = torch.where(mask[:, :, None], stage, 0)
        wanted = torch.nn.functional.pad(kept, (0, 0, 0, 2)).reshape(6, 3 * H)
        rows, tokens = torch.empty(4, 3 * H, dtype=dtype), torch.empty(2, 7, H, dtype=dtype)
        ops.pack_patches(stage, offsets.contiguous(), mask, 1, rows)
        assert torch.equal(rows, wanted[1:5])
        ops.unpack_patches(torch.ones_like(wanted), offsets.contiguous(), mask, 0, tokens)
        assert torch.equal(tokens, mask[:, :, None].expand(2, 7, H).to(dtype))


def test_bits_do_not_depend_on_who_runs_first(backend: str) -> None:
    given = small("conv-holes-norm", torch.float32)
    first = run(view_aligned_attention, given, backend=backend)
    for seed in (1, 2):
        cuda_on_host.set_schedule(seed)
        loss, gradients = run(view_aligned_attention, given, backend=backend)
        assert torch.equal(loss, first[0])
        assert all(map(torch.equal, gradients, first[1]))


@pytest.mark.parametrize("norm", (False, True))
def test_loss_of_chunks_is_the_loss(norm: bool, backend: str) -> None:
    """Row by row the same bits; no target row of weight 0 is read."""
    y, weight, bias = torch.randn(11, 5), torch.randn(700, 5), torch.randn(700)
    target, rows = torch.randn(11, 700), torch.rand(11)
    target[4], rows[4] = torch.nan, 0
    options = {"row_weight": rows, "target_norm": norm, "reduction": "none", "backend": backend}
    whole = fused_linear_mse(y, weight, bias, target, **options)
    parts = fused_linear_mse(y, weight, bias, target, chunk_rows=4, **options)
    truth = fused_linear_mse(y, weight, bias, target, **options | {"backend": "reference"})
    torch.testing.assert_close(whole, truth, rtol=4e-6, atol=0)
    torch.testing.assert_close(parts, whole, rtol=4e-6, atol=0)
