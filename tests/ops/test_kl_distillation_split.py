"""kl_distillation with each row split among several programs, as where rows are few."""

import math
from typing import Any

import pytest
import torch

from deepfusion_kernels import kl_distillation
from deepfusion_kernels.ops.kl_distillation import triton_impl
from tests.ops.test_kl_distillation import check_against_law, labels_for, logits

STEM = "kl_distillation"
BACKENDS = ("triton",)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@pytest.fixture(autouse=True)
def _many_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_impl, "BLOCK_V", (32, 32, 16))
    monkeypatch.setattr(triton_impl, "CAPPED_BLOCK_V", 16)
    monkeypatch.setattr(triton_impl, "multiprocessors", lambda _: 8)


@pytest.mark.parametrize(
    ("T", "V", "processors", "wanted"),
    [
        (1, 151936, 132, (38, 4096)),
        (100, 151936, 132, (3, 13 * 4096)),
        (264, 151936, 132, (1, 38 * 4096)),
        (8192, 151936, 132, (1, 38 * 4096)),
        (4, 100, 132, (1, 4096)),
        (4, 32000, 0, (1, 8 * 4096)),
    ],
)
def test_rows_are_split_where_they_are_few(
    T: int, V: int, processors: int, wanted: tuple[int, int]
) -> None:
    segments, span = triton_impl.split(T, V, 4096, processors)
    assert (segments, span) == wanted
    assert (segments - 1) * span < V <= segments * span


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_within_budget(
    backend: str, device: torch.device, divergence: str, softcap: float | None
) -> None:
    student, teacher = logits(3, 203), logits(3, 190)
    options: dict[str, Any] = {"divergence": divergence, "beta": 0.3, "temperature": 1.7}
    check_against_law(backend, device, student, teacher, softcap=softcap, **options)
    options |= {"ce_weight": 0.5, "kd_weight": 0.7, "labels": labels_for(student)}
    check_against_law(backend, device, student, teacher, softcap=softcap, **options)


def test_cross_entropy_alone(backend: str, device: torch.device) -> None:
    student, labels = logits(3, 203).to(device), torch.tensor([0, 202, -100], device=device)
    ours = kl_distillation(
        student, None, labels, kd_weight=0.0, ce_weight=1.0, reduction="none", backend=backend
    )
    wanted = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_missing_columns_and_nan(backend: str, device: torch.device, divergence: str) -> None:
    """Whole segments without a value; one whose only value is NaN; rows on one side alone."""
    student, teacher = logits(5, 203).to(device), logits(5, 203).to(device)
    student[0, :70] = teacher[0, :70] = -math.inf
    student[1, :70] = teacher[1, :70] = -math.inf
    student[1, 3] = math.nan
    teacher[2, 60:140] = -math.inf
    student[3, 60:140] = -math.inf
    student[4] = -math.inf
    options: dict[str, Any] = {"divergence": divergence, "reduction": "none"}
    ours = kl_distillation(student, teacher, **options, backend=backend)
    wanted = kl_distillation(student, teacher, **options, backend="reference")
    torch.testing.assert_close(ours, wanted, equal_nan=True)


def test_bits_repeat(backend: str, device: torch.device) -> None:
    student, teacher = logits(3, 203).to(device), logits(3, 203).to(device)
    first, second = (
        kl_distillation(student, teacher, divergence="jsd", reduction="none", backend=backend)
        for _ in range(2)
    )
    assert torch.equal(first, second)
