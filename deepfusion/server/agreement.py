"""Two teachers a sequence, neither with more than half of the KL's weight.

    s_kd  = exp(-nll_kd)                   how well teacher k predicts public text of domain d
    w_k   = min(1/2, s_kd / (s_ad + s_bd))     a, b: a sequence's two nearest teachers
    P*    = sum_k w_k P_k + (1 - sum_k w_k) Q

    grad KL(P* || Q) = sum_k w_k grad KL(P_k || Q)        so each teacher's KL is taken by itself

A teacher that nobody seconds counts half: what it says alone is not believed outright. Scores are
taken by domain, so that the only specialist of a small domain keeps its half there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepfusion_kernels import fused_linear_kl_distillation

from ..data.batches import Packed
from ..models import build
from .affinity import best_teacher
from .quarantine import probe, probe_text
from .teaching import IGNORED, TERMS_EVERY, Teaching, backend_of

CAP = 0.5
PROBE_SEQUENCES, PROBE_BATCH = 16, 16


@dataclass(frozen=True)
class Agreement(Teaching):
    """Teaching whose sequences have a second teacher [S] (-1: none) and both weights [S, 2]."""

    second: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    weight: Tensor = field(default_factory=lambda: torch.empty(0, 2))

    def loss(
        self, ids_BL: Tensor, teacher_B: Tensor, step: int, rows_B: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Terms of one batch as `Teaching.loss`; rows [B]: which sequences these are."""
        assert rows_B is not None, "second teachers are looked up by the sequence's number"
        if self.beta <= 0 or bool((teacher_B < 0).all()):
            return super().loss(ids_BL, teacher_B, step, rows_B)
        hidden_BLD, stages = self._run(self.student, ids_BL)
        second_B, weight_B2 = self.second[rows_B], self.weight[rows_B]
        ce_sum = self._token_sum(ids_BL, hidden_BLD)
        kl_sum = feature = torch.zeros((), device=ids_BL.device)
        for owner in torch.unique(torch.cat([teacher_B, second_B])).tolist():
            if owner < 0:
                continue
            weight_B = (weight_B2 * torch.stack([teacher_B, second_B], 1).eq(owner)).sum(dim=1)
            asked_b = weight_B.nonzero().flatten()
            with torch.no_grad():
                known = self._run(self.teachers[owner], ids_BL[asked_b])
            kl_sum = kl_sum + self._kl_sum(
                owner, ids_BL[asked_b], hidden_BLD[asked_b], known[0], weight_B[asked_b]
            )
            own_b = teacher_B[asked_b] == owner
            if self.stages and bool(own_b.any()):
                ours = [stage[teacher_B == owner] for stage in stages]
                part = self.feature_loss(owner, ours, [stage[own_b] for stage in known[1]])
                feature = feature + part * (int(own_b.sum()) / len(ids_BL))
        tokens = ids_BL[:, 1:].numel()
        terms = {"loss": (ce_sum + self.beta * kl_sum) / tokens + self.alpha * feature}
        if self.stages:
            terms["feature"] = feature.detach()
        if step % TERMS_EVERY == 0:
            taught = (teacher_B >= 0).sum() * (ids_BL.shape[1] - 1)
            terms |= {"ce": ce_sum.detach() / tokens, "kl": kl_sum.detach() / taught}
        return terms

    def _kl_sum(
        self,
        owner: int,
        ids_BL: Tensor,
        hidden_BLD: Tensor,
        teacher_hidden_BLD: Tensor,
        weight_B: Tensor,
    ) -> Tensor:
        """sum over tokens of w KL(teacher || student)."""
        loss: Tensor = fused_linear_kl_distillation(
            hidden_BLD,
            build.head_weight(self.student),
            teacher_hidden_BLD,
            build.head_weight(self.teachers[owner]),
            F.pad(ids_BL[:, 1:], (0, 1), value=IGNORED),
            kd_weight=1.0,
            temperature=self.temperature,
            scale_by_temperature_squared=True,
            row_weight=weight_B[:, None].expand(ids_BL.shape).contiguous(),
            vocab_align="truncate",
            reduction="sum",
            backend=backend_of(self.kernels),
        )
        return loss


def agreed(
    teaching: Teaching, sequences: Packed, affinity_SK: Tensor, threshold: float
) -> Agreement:
    """The same teaching with a second teacher where one is near enough, and capped weights.

    affinity [S, K] as for `best_teacher`.
    """
    first_S = best_teacher(affinity_SK, threshold)
    without_first_SK = affinity_SK.scatter(1, first_S.clamp_min(0)[:, None], -torch.inf)
    second_S = best_teacher(without_first_SK, threshold)
    second_S = torch.where(first_S >= 0, second_S, -1)
    models = [one for one in teaching.teachers if isinstance(one, nn.Module)]
    assert len(models) == len(teaching.teachers), "the configuration asks it of models alone"
    score_DK = _scores(models, sequences)
    score_SK = score_DK[sequences.domain]
    chosen_S2 = torch.stack([first_S, second_S], dim=1)
    own_S2 = score_SK.gather(1, chosen_S2.clamp_min(0)) * (chosen_S2 >= 0)
    weight_S2 = (own_S2 / own_S2.sum(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(CAP)
    kept = {one.name: getattr(teaching, one.name) for one in fields(Teaching)}
    return Agreement(**kept, second=second_S, weight=weight_S2)


def _scores(teachers: Sequence[nn.Module], sequences: Packed) -> Tensor:
    """exp(-nll) of every teacher on every domain's public text, [D, K]; 0 where there is none."""
    text = probe_text(sequences, PROBE_SEQUENCES)
    models = [(str(index), partial(_itself, one)) for index, one in enumerate(teachers)]
    found = probe(models, text, PROBE_BATCH)
    score_DK = torch.zeros(len(sequences.domains), len(teachers))
    for index, domain in enumerate(sequences.domains):
        for teacher, own in found.items():
            if domain in own:
                # a score of 0 would leave a lone teacher without its half
                score_DK[index, int(teacher)] = max(1e-20, 1 / own[domain].perplexity)
    return score_DK


def _itself(model: nn.Module) -> nn.Module:
    return model
