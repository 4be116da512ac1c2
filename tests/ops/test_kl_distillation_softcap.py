"""kl_distillation with a soft cap: the law, every backend within budget, what stays missing."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import kl_distillation
from tests.ops.test_kl_distillation import (
    check_against_law,
    labels_for,
    logits,
    soft_capped,
    value_and_gradients,
)

STEM = "kl_distillation"
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_reference_is_the_law_of_capped_logits(divergence: str) -> None:
    student, teacher = logits(4, 7).double(), logits(4, 7).double()
    options: dict[str, Any] = {"divergence": divergence, "temperature": 1.7, "ce_weight": 0.6}
    options |= {"labels": labels_for(student), "reduction": "none", "backend": "reference"}

    def rows(s: Tensor, t: Tensor) -> Tensor:
        return kl_distillation(s, t, softcap=2.5, **options)

    def spelled(s: Tensor, t: Tensor) -> Tensor:
        return kl_distillation(soft_capped(s, 2.5), soft_capped(t, 2.5), **options)

    assert torch.autograd.gradcheck(rows, (student.requires_grad_(), teacher.requires_grad_()))
    dloss = torch.randn(4).double()
    ours = value_and_gradients(rows, student, teacher, dloss)
    theirs = value_and_gradients(spelled, student, teacher, dloss)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_within_budget(
    backend: str, device: torch.device, divergence: str, dtype: torch.dtype
) -> None:
    student, teacher = logits(4, 33, std=10, dtype=dtype), logits(4, 33, std=10, dtype=dtype)
    options: dict[str, Any] = {"divergence": divergence, "softcap": 7.0, "temperature": 2.0}
    check_against_law(backend, device, student, teacher, **options)
    options |= {"ce_weight": 0.5, "labels": labels_for(student), "temperature": 1.0}
    check_against_law(backend, device, student, teacher, **options)
    # small logits: the cap is almost the identity, and must lose none of their digits
    check_against_law(backend, device, student / 64, teacher / 64, softcap=30.0)


def test_several_blocks_and_truncated_vocabularies(backend: str, device: torch.device) -> None:
    for V_s, V_t in ((4100, 4100), (5000, 4100), (4100, 5000)):
        options: dict[str, Any] = {"labels": torch.tensor([0, V_s - 1, 7]), "ce_weight": 0.3}
        check_against_law(backend, device, logits(3, V_s), logits(3, V_t), softcap=5.0, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("missing", [-math.inf, torch.finfo(torch.float32).min])
def test_missing_columns_stay_missing(
    backend: str, device: torch.device, divergence: str, missing: float
) -> None:
    student, teacher = logits(3, 40).to(device), logits(3, 40).to(device)
    options: dict[str, Any] = {"divergence": divergence, "softcap": 4.0, "backend": backend}
    options["reduction"] = "none"
    dloss = torch.ones(3, device=device)
    small = value_and_gradients(kl_distillation, student[:, :30], teacher[:, :30], dloss, **options)
    student[:, 30:] = teacher[:, 30:] = missing
    found = value_and_gradients(kl_distillation, student, teacher, dloss, **options)
    torch.testing.assert_close(found[0], small[0])
    for ours, wanted in zip(found[1:], small[1:], strict=True):
        torch.testing.assert_close(ours[:, :30], wanted)
        assert not ours[:, 30:].any()


def test_masked_rows_are_never_read_and_bad_ones_stay_alone(
    backend: str, device: torch.device, poisoned_memory: None
) -> None:
    student, teacher = logits(4, 50).to(device), logits(4, 50).to(device)
    student[1], student[2, 3] = math.nan, math.nan
    options: dict[str, Any] = {"labels": torch.tensor([3, -100, 5, 7], device=device)}
    options |= {"softcap": 4.0, "ce_weight": 0.5, "reduction": "none", "backend": backend}
    dloss = torch.ones(4, device=device)
    rows, gradient, _ = value_and_gradients(kl_distillation, student, teacher, dloss, **options)
    assert rows.isnan().tolist() == [False, False, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, False, True, False]
    assert not gradient[1].any()


@pytest.mark.parametrize("softcap", [0.0, -1.0, math.inf, math.nan])
def test_a_cap_that_caps_nothing_is_refused(softcap: float) -> None:
    with pytest.raises(ValueError, match="softcap must be None, or finite and > 0, got"):
        kl_distillation(torch.zeros(2, 3), torch.zeros(2, 3), softcap=softcap)
