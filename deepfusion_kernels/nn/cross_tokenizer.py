"""Distillation where teacher and student cut the text differently.

mapped   p'_v = sum of p_i over teacher ids i with M(i) = v, the rest in one bucket; KL(p' || q)
         on rows whose next token spells the same characters on both sides
uld      sum_i |q_(i) - p_(i)|, sorted, on rows that stand at one boundary
alm      the odds of every shared span of text under both models
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import INTEGERS, expect, expect_option, expect_that
from ..cross_tokenizer.tables import AlignedBatch, paired_rows
from ..ops.kl_distillation.op import kl_distillation
from ..ops.topk_kl.op import topk_kl_distillation
from .alm import alm_distillation
from .uld import uld_distillation

OP = "mapped_distillation"
BRIDGES = ("mapped", "uld", "alm")


def mapped_distillation(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    vocabulary_map: Tensor,
    labels: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """topk_kl_distillation from a teacher of another vocabulary: its mass moves along the map.

    p'_v = sum of e^logprob over kept ids i with M(i) = v; what is not kept or not mapped is the
    bucket. student_logits [..., V_s]; teacher_ids [..., K] int, ids of the teacher;
    teacher_logprobs [..., K] at the temperature used; vocabulary_map [V_t] int64, -1 for none;
    options: the keywords of topk_kl_distillation. Exact on the matched part where both sides have
    a boundary. Raises ValueError naming the argument. Source: arXiv 2401.10491, 2406.02224.
    """
    (V_t,) = expect(vocabulary_map, OP, "vocabulary_map", "V_t", dtype=torch.int64)
    (K,) = expect(teacher_ids, OP, "teacher_ids", "... K", dtype=INTEGERS, like=student_logits)
    expect(teacher_logprobs, OP, "teacher_logprobs", "... K", K=K, like=student_logits)
    same = teacher_ids.shape == teacher_logprobs.shape
    got = list(teacher_logprobs.shape)
    expect_that(same, OP, "teacher_logprobs", f"{list(teacher_ids.shape)} as teacher_ids", got)
    ids = teacher_ids.long()
    inside = (ids >= 0) & (ids < V_t)
    mapped = vocabulary_map.to(ids.device)[torch.where(inside, ids, 0)]
    merged = _merged(torch.where(inside, mapped, -1), teacher_logprobs)
    return topk_kl_distillation(student_logits, *merged, labels, **options)


def _merged(ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Equal ids as one entry with all their mass; entries that are left over have id -1."""
    ids, order = ids.sort(dim=-1, stable=True)
    mass = logprobs.double().exp().gather(-1, order)
    is_new = F.pad(ids.diff(dim=-1) != 0, (1, 0))
    place = is_new.cumsum(-1)
    summed = torch.zeros_like(mass).scatter_add(-1, place, mass)
    return torch.full_like(ids, -1).scatter(-1, place, ids), summed.log()


class CrossTokenizerLoss(nn.Module):
    """The teacher's term across tokenizers, from both models' logits and an AlignedBatch.

    bridge: 'mapped' (needs vocabulary_map [V_t] of CrossTokenizer.vocabulary_map; keeps the top_k
    likeliest teacher tokens of a row), 'uld' or 'alm'. temperature: None for 1, or 100 with 'alm'.
    reduction: 'mean' over the rows or spans that count, or their 'sum'. The teacher gets no
    gradient; a batch where nothing can be compared has loss 0. Raises ValueError for options.
    """

    vocabulary_map: Tensor | None

    def __init__(
        self,
        bridge: str,
        *,
        vocabulary_map: Tensor | None = None,
        top_k: int = 128,
        temperature: float | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        expect_option(bridge, name, "bridge", BRIDGES)
        expect_option(reduction, name, "reduction", ("mean", "sum"))
        needs = (bridge == "mapped") == (vocabulary_map is not None)
        expect_that(needs, name, "vocabulary_map", "given for 'mapped' alone", repr(bridge))
        expect_that(top_k >= 1, name, "top_k", ">= 1", top_k)
        self.bridge, self.top_k, self.reduction = bridge, top_k, reduction
        self.temperature = (
            (100.0 if bridge == "alm" else 1.0) if temperature is None else temperature
        )
        self.backend = backend
        self.register_buffer("vocabulary_map", vocabulary_map, persistent=False)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, batch: AlignedBatch
    ) -> Tensor:
        """student_logits [B, L_s, V_s], teacher_logits [B, L_t, V_t] -> float32 scalar."""
        name, (B, L_s) = type(self).__name__, batch.student_ids.shape
        expect(student_logits, name, "student_logits", "B L_s V_s", B=B, L_s=L_s)
        L_t = batch.teacher_ids.shape[1]
        expect(teacher_logits, name, "teacher_logits", "B L_t V_t", B=B, L_t=L_t)
        teacher_logits = teacher_logits.detach()
        if self.bridge == "alm":
            return self._alm(student_logits, teacher_logits, batch)
        rows_BL = paired_rows(batch, whole_token=self.bridge == "mapped")
        weight_BL = (rows_BL >= 0).to(student_logits.dtype)
        rows_BL1 = rows_BL.clamp(min=0)[..., None]
        options: dict[str, Any] = {
            "row_weight": weight_BL,
            "reduction": self.reduction,
            "temperature": self.temperature,
        }
        if self.bridge == "uld":
            return uld_distillation(student_logits, _rows(teacher_logits, rows_BL1), **options)
        scaled = teacher_logits.float() / self.temperature
        kept = scaled.log_softmax(-1).topk(min(self.top_k, scaled.shape[-1]), dim=-1)
        ids, logprobs = (_rows(one, rows_BL1) for one in (kept.indices, kept.values))
        assert self.vocabulary_map is not None, "the constructor asks for it"
        return mapped_distillation(
            student_logits,
            ids,
            logprobs,
            self.vocabulary_map,
            scale_by_temperature_squared=True,
            backend=self.backend,
            **options,
        )

    def _alm(self, student_logits: Tensor, teacher_logits: Tensor, batch: AlignedBatch) -> Tensor:
        # a span with the first token of a text has no likelihood
        starts = torch.stack([batch.student_spans[..., 0], batch.teacher_spans[..., 0]])
        weight_BC = (starts > 0).all(0).to(torch.float32)
        return alm_distillation(
            self._logprobs(student_logits, batch.student_ids, batch.student_mask),
            self._logprobs(teacher_logits, batch.teacher_ids, batch.teacher_mask),
            batch.student_spans,
            batch.teacher_spans,
            temperature=self.temperature,
            span_weight=weight_BC,
            reduction=self.reduction,
        )

    def _logprobs(self, logits_BLV: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """ln p of the token at each place [B, L]; 0 at the first and outside the spans."""
        if ids_BL.shape[1] < 2:
            return logits_BLV.new_zeros(ids_BL.shape)
        ce_BL = kl_distillation(
            logits_BLV[:, :-1], None, torch.where(mask_BL, ids_BL, -100)[:, 1:], kd_weight=0.0,
            ce_weight=1.0, reduction="none", backend=self.backend,
        )  # fmt: skip
        return F.pad(-ce_BL, (1, 0))


def _rows(values_BLX: Tensor, rows_BL1: Tensor) -> Tensor:
    """The teacher's row for every row of the student."""
    return values_BLX.gather(1, rows_BL1.expand(-1, -1, values_BLX.shape[-1]))
