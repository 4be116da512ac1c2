"""From a proxy of another tokenizer to the student: the same public text, cut where both agree.

shared     no bridge: the ids are the same
mapped     KL to the proxy's mass moved along the vocabulary map (MinED beyond equal bytes)
uld        sorted probabilities
alm        the odds of every shared span; tau = 100
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deepfusion_kernels import AlignedBatch, CrossTokenizer, align_batch, patch_offsets
from deepfusion_kernels.nn import CrossTokenizerLoss

from ..config_tables import DistillConfig
from .teaching import backend_of


class Bridge:
    """Aligns public sequences of the base's ids with the devices' tokenizer, and compares logits.

    Sequences are cut to the same number of tokens on the proxy's side: its models know no more
    positions. Raises ValueError for tokenizers that cannot be aligned.
    """

    def __init__(
        self, base: Any, device: Any, config: DistillConfig, kernels: str, cache_size: int
    ) -> None:
        kind = config.tokenizer_bridge
        self.both = CrossTokenizer(base, device, cache_size=cache_size)
        self.patch_size = config.patch_size
        options: dict[str, Any] = {}
        if kind == "mapped":
            options["vocabulary_map"] = self.both.vocabulary_map("min_edit")
        if kind != "alm":
            options["temperature"] = config.temperature
        self.loss = CrossTokenizerLoss(kind, backend=backend_of(kernels), **options)

    def check(self, ids_SL: Tensor) -> None:
        """Raises ValueError naming the first sequence that a side's tokens do not spell."""
        for n, ids in enumerate(ids_SL.tolist()):
            try:
                self.both.align_ids(ids)
            except ValueError as error:
                raise ValueError(
                    f"distill.tokenizer_bridge: public sequence {n}: {error}"
                ) from None

    def batch(self, ids_BL: Tensor) -> AlignedBatch:
        """Tables of the sequences [B, L]; the proxy's ids are [B, L] as well."""
        length = ids_BL.shape[1]
        alignments = [self.both.align_ids(ids) for ids in ids_BL.tolist()]
        batch = align_batch(alignments, student_length=length, teacher_length=length)
        return batch.to(ids_BL.device)

    def divergence(
        self,
        batch: AlignedBatch,
        hidden: Sequence[Tensor],
        heads: Sequence[Tensor],
    ) -> Tensor:
        """L_KL of student and proxy from hidden states [B, L, D] and heads [V, D]: a mean."""
        student, teacher = (one @ head.T for one, head in zip(hidden, heads, strict=True))
        loss: Tensor = self.loss.to(student.device)(student, teacher, batch)
        return loss

    def patches(self, batch: AlignedBatch) -> dict[str, Tensor]:
        """What the views need to compare the same characters."""
        student, teacher = patch_offsets(batch, self.patch_size)
        device = batch.student_ids.device
        return {
            "student_offsets": student.to(device),
            "teacher_offsets": teacher.to(device),
            "attention_mask": batch.student_mask,
            "teacher_mask": batch.teacher_mask,
        }
