"""kl_distillation's own tests on its CUDA kernels, run on the host (tests/cuda_on_host.py)."""

from collections.abc import Iterator

import pytest
import torch

from deepfusion_kernels import kl_distillation
from deepfusion_kernels.ops.kl_distillation import native_impl
from tests import cuda_on_host
from tests.ops.test_kl_distillation import (  # noqa: F401
    test_gradients_within_budget,
    test_near_teacher_gradient_keeps_its_relative_error,
    test_only_wanted_gradients,
    test_sides_of_different_dtype,
    test_truncated_vocabularies,
)
from tests.ops.test_kl_distillation_edges import (  # noqa: F401
    test_bad_rows_are_nan_and_alone,
    test_columns_missing_on_one_side,
    test_every_element_is_written,
    test_masked_rows_are_never_read,
    test_missing_label_is_an_infinite_cross_entropy,
    test_no_rows_and_one_column,
)
from tests.ops.test_kl_distillation_softcap import (  # noqa: F401
    test_missing_columns_stay_missing,
    test_several_blocks_and_truncated_vocabularies,
)

STEM = "kl_distillation"
BACKENDS = ("cuda",)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    cuda_on_host.serve(monkeypatch, native_impl)
    yield "cuda"
    cuda_on_host.set_schedule(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.mark.parametrize("divergence", ("forward_kl", "reverse_kl", "jsd"))
def test_bits_do_not_depend_on_who_runs_first(divergence: str, backend: str) -> None:
    """A barrier that is missing shows when other warps or lanes run ahead."""
    student, teacher = torch.randn(2, 3, 5000)
    student.requires_grad_()
    results = []
    for seed in (0, 1, 2, 3):
        cuda_on_host.set_schedule(seed)
        loss = kl_distillation(student, teacher, divergence=divergence, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    for later in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(later, results[0], strict=True))
