"""The loss modules hold options and hand tensors on; compact drops rows, nothing else."""

import pytest
import torch

from deepfusion_kernels import fused_linear_kl_distillation, kl_distillation
from deepfusion_kernels.nn.losses import FusedLinearKLDistillationLoss, KLDistillationLoss


def test_kl_module_is_its_door() -> None:
    student, teacher = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    module = KLDistillationLoss(temperature=2.0, divergence="jsd")
    wanted = kl_distillation(student, teacher, temperature=2.0, divergence="jsd")
    assert torch.equal(module(student, teacher), wanted)
    assert "temperature=2.0" in repr(module)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compact_changes_nothing_but_the_work(reduction: str) -> None:
    hidden = torch.randn(2, 4, 6, requires_grad=True)
    weight, heads = torch.randn(9, 6, requires_grad=True), (torch.randn(2, 4, 5), torch.randn(9, 5))
    labels, row_weight = torch.randint(9, (2, 4)), torch.rand(2, 4)
    labels[0, 1], row_weight[1, 2] = -100, 0.0
    options = {"ce_weight": 0.5, "reduction": reduction}
    found = []
    for compact in (False, True):
        module = FusedLinearKLDistillationLoss(compact=compact, **options)
        loss = module(hidden, weight, *heads, labels, row_weight=row_weight)
        found.append((loss, *torch.autograd.grad(loss.sum(), (hidden, weight))))
    door = fused_linear_kl_distillation(
        hidden, weight, *heads, labels, row_weight=row_weight, **options
    )
    assert torch.equal(found[0][0], door)
    for plain, compacted in zip(*found, strict=True):
        torch.testing.assert_close(compacted, plain)


def test_compact_with_every_row_masked() -> None:
    module = FusedLinearKLDistillationLoss(compact=True)
    labels = torch.full((3,), -100)
    assert (
        module(torch.randn(3, 4), torch.randn(7, 4), torch.randn(3, 4), torch.randn(7, 4), labels)
        == 0
    )
