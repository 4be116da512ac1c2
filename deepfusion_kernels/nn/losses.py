"""Distillation losses as modules: they hold the options and hand tensors to the doors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import expect_that
from ..ops.fused_linear_kl.op import fused_linear_kl_distillation
from ..ops.kl_distillation.op import kl_distillation


class KLDistillationLoss(nn.Module):
    """kl_distillation with its options fixed, as KLDistillationLoss(temperature=2.0).

    Options are the keywords of deepfusion_kernels.kl_distillation except row_weight, which is given
    with the tensors. Raises what the door raises, at the call.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """student_logits [..., V_s], teacher_logits [..., V_t] -> float32 scalar, or [...]."""
        return kl_distillation(
            student_logits, teacher_logits, labels, row_weight=row_weight, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class FusedLinearKLDistillationLoss(nn.Module):
    """fused_linear_kl_distillation with its options fixed; logits are never whole in memory.

    lm_head: the student's head, when it is to be a part of this module; a tied embedding's weight
    may be its own. Options are the keywords of deepfusion_kernels.fused_linear_kl_distillation
    except biases and row_weight, which are given with the tensors. compact: masked rows are dropped
    before the GEMMs, which pays where many are; on a GPU their count costs one synchronisation with
    the host, and the shapes then depend on the data, so a full graph cannot hold it.
    """

    def __init__(
        self, *, lm_head: nn.Linear | None = None, compact: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.compact = compact
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        labels: Tensor | None = None,
        row_weight: Tensor | None = None,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        """hidden [..., D], weight [V, D] of either side -> float32 scalar, or [...].

        student_weight and student_bias are None where the module owns the head. Raises ValueError.
        """
        student_weight, student_bias = self._head(student_weight, student_bias)
        kept = self._kept(labels, row_weight) if self.compact else None

        def rows(of: Tensor | None) -> Tensor | None:
            return of if of is None or kept is None else of[kept]

        loss = fused_linear_kl_distillation(
            student_hidden if kept is None else student_hidden[kept],
            student_weight,
            rows(teacher_hidden),
            teacher_weight,
            rows(labels),
            row_weight=rows(row_weight),
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            **self.options,
        )
        if kept is None or self.options.get("reduction", "mean") != "none":
            return loss
        return loss.new_zeros(student_hidden.shape[:-1]).index_put(kept, loss)

    def _head(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        name = type(self).__name__
        if self.lm_head is None:
            expect_that(weight is not None, name, "student_weight", "given without lm_head", weight)
            assert weight is not None, "just checked"
            return weight, bias
        given = weight is not None or bias is not None
        expect_that(not given, name, "student_weight", "None: lm_head is owned", "a tensor")
        # NOTE: the gradient of a head that is gathered here would not be summed over the ranks.
        sharded = hasattr(self.lm_head.weight, "full_tensor")
        wanted = "whole in forward: fully_shard this module or one around it, not lm_head alone"
        expect_that(not sharded, name, "lm_head", wanted, "a DTensor")
        return self.lm_head.weight, self.lm_head.bias

    def _kept(self, labels: Tensor | None, row_weight: Tensor | None) -> tuple[Tensor, ...] | None:
        """Where the unmasked rows stand, or None where nothing can be masked."""
        masks = []
        if labels is not None:
            masks.append(labels != self.options.get("ignore_index", -100))
        if row_weight is not None:
            masks.append(row_weight != 0)
        return torch.stack(masks).all(0).nonzero(as_tuple=True) if masks else None

    def extra_repr(self) -> str:
        shown = {**self.options, "compact": self.compact}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
