"""One batch of public text, part of it taught by frozen proxies.

    L = (1/T) [ sum_t CE_t + beta tau^2 sum_{t taught} KL(P^teacher_t || P^student_t) ] + alpha L_FM
    L_FM = sum_i (taught by i / batch) L_FM,i         T: all next tokens of the batch

A sequence has one teacher or none. Without a teacher at all, L is plain cross entropy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepfusion_kernels import fused_linear_kl_distillation
from deepfusion_kernels.nn import StageCollector

from ..models import build
from ..training import cross_entropy
from .kept import KeptText

if TYPE_CHECKING:
    from .bridge import Bridge

# a proxy, or what a cluster said of the public text
Teacher = nn.Module | KeptText

# how often L is recorded by term: one more pass over the vocabulary, without gradient
TERMS_EVERY = 10
IGNORED = -100


@dataclass(frozen=True)
class Teaching:
    """A student, its teachers, and how much each term counts; views[i] belongs to teachers[i].

    A teacher without a model has no features and a temperature of 1.

    bridge: for teachers of another tokenizer; the KL is then a mean over what can be compared.
    """

    student: nn.Module
    teachers: Sequence[Teacher] = ()
    views: Sequence[nn.Module] = field(default_factory=tuple)
    alpha: float = 0.0
    beta: float = 0.0
    temperature: float = 1.0
    num_stages: int = 4
    student_norm: bool = False
    kernels: str = "auto"
    bridge: Bridge | None = None

    def __post_init__(self) -> None:
        for teacher in self.teachers:
            if isinstance(teacher, nn.Module):
                teacher.eval().requires_grad_(False)
            elif self.stages or self.temperature != 1.0 or self.bridge is not None:
                raise ValueError(
                    "teaching: log-probabilities teach at temperature 1, without features and "
                    f"without a bridge, got temperature {self.temperature}, {self.stages} stages"
                )

    @property
    def stages(self) -> int:
        """How many stage features a forward pass must keep."""
        return self.num_stages if self.alpha > 0 and self.views else 0

    def loss(
        self, ids_BL: Tensor, teacher_B: Tensor, step: int, rows_B: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Terms of one batch: ids [B, L] int64, teacher [B] int64, -1 for none; sorted is fastest.

        rows [B]: which public sequences these are, for teachers without a model, or more than one.

        "loss" is L; "feature" is L_FM; every TERMS_EVERY steps also "ce" and "kl", as means over
        all and over the taught tokens.
        """
        teacher_B = teacher_B if self.beta > 0 or self.stages else torch.full_like(teacher_B, -1)
        if bool((teacher_B < 0).all()):
            ce = cross_entropy(self.student, ids_BL, self.kernels)
            return {"loss": ce, "ce": ce.detach()} if step % TERMS_EVERY == 0 else {"loss": ce}
        hidden_BLD, stages = self._run(self.student, ids_BL)
        found, sizes = torch.unique_consecutive(teacher_B, return_counts=True)
        counts = sizes.tolist()
        # split, not slices: its gradient is one concatenation
        ids, hidden, *views = (torch.split(one, counts) for one in (ids_BL, hidden_BLD, *stages))
        rows = [None] * len(counts) if rows_B is None else torch.split(rows_B, counts)
        total = torch.zeros((), device=ids_BL.device)
        feature = torch.zeros((), device=ids_BL.device)
        for n, owner in enumerate(found.tolist()):
            part = self._part(owner, ids[n], hidden[n], [stage[n] for stage in views], rows[n])
            total = total + part[0]
            feature = feature + part[1] * (counts[n] / len(ids_BL))
        tokens = ids_BL[:, 1:].numel()
        terms = {"loss": total / tokens + self.alpha * feature}
        if self.stages:
            terms["feature"] = feature.detach()
        if step % TERMS_EVERY == 0:
            terms |= self._terms(ids_BL, hidden_BLD, total, teacher_B)
        return terms

    def _run(self, model: nn.Module, ids_BL: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Last hidden states [B, L, D] and the stage features, if any are compared."""
        if not self.stages:
            return self._hidden(model, ids_BL), []
        with StageCollector(build.layers(model), self.stages) as stages:
            return self._hidden(model, ids_BL), stages.tensors()

    def _hidden(self, model: nn.Module, ids_BL: Tensor) -> Tensor:
        hidden_BLD: Tensor = build.backbone(model)(ids_BL, use_cache=False).last_hidden_state
        return hidden_BLD

    def feature_loss(
        self,
        owner: int,
        student_stages: Sequence[Tensor],
        teacher_stages: Sequence[Tensor],
        patches: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """L_FM of the sequences that one teacher teaches; patches: tables of a bridge."""
        if self.student_norm:
            student_stages = [F.layer_norm(stage, stage.shape[-1:]) for stage in student_stages]
        loss: Tensor = self.views[owner](
            student_stages, teacher_stages, backend=backend_of(self.kernels), **(patches or {})
        )
        return loss

    def _part(
        self,
        owner: int,
        ids_BL: Tensor,
        hidden_BLD: Tensor,
        student_stages: Sequence[Tensor],
        rows_B: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Sum over tokens of CE + beta KL, and L_FM, of the sequences that one teacher teaches."""
        nothing = torch.zeros((), device=ids_BL.device)
        if owner < 0:
            return self._token_sum(ids_BL, hidden_BLD), nothing
        teacher = self.teachers[owner]
        if isinstance(teacher, KeptText):
            assert rows_B is not None, "a teacher without a model is asked by the sequence's number"
            head_VD = build.head_weight(self.student)
            backend = backend_of(self.kernels)
            return teacher.token_sum(rows_B, hidden_BLD, head_VD, self.beta, backend), nothing
        if self.bridge is not None:
            return self._bridged(self.bridge, teacher, owner, ids_BL, hidden_BLD, student_stages)
        with torch.no_grad():
            teacher_hidden_BLD, teacher_stages = self._run(teacher, ids_BL)
        token_sum = self._token_sum(ids_BL, hidden_BLD, teacher, teacher_hidden_BLD)
        if not self.stages:
            return token_sum, nothing
        return token_sum, self.feature_loss(owner, student_stages, teacher_stages)

    def _bridged(
        self,
        bridge: Bridge,
        teacher: nn.Module,
        owner: int,
        ids_BL: Tensor,
        hidden_BLD: Tensor,
        student_stages: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """`_part` where the teacher reads the same text by other ids."""
        batch = bridge.batch(ids_BL)
        with torch.no_grad():
            teacher_hidden_BLD, teacher_stages = self._run(teacher, batch.teacher_ids)
        token_sum = self._token_sum(ids_BL, hidden_BLD)
        if self.beta > 0:
            hidden = hidden_BLD, teacher_hidden_BLD
            heads = build.head_weight(self.student), build.head_weight(teacher)
            mean = bridge.divergence(batch, hidden, heads)
            token_sum = token_sum + self.beta * ids_BL[:, 1:].numel() * mean
        if not self.stages:
            return token_sum, torch.zeros_like(token_sum)
        patches = bridge.patches(batch)
        return token_sum, self.feature_loss(owner, student_stages, teacher_stages, patches)

    def _token_sum(
        self,
        ids_BL: Tensor,
        hidden_BLD: Tensor,
        teacher: nn.Module | None = None,
        teacher_hidden_BLD: Tensor | None = None,
    ) -> Tensor:
        # the last position has no next token: masked, so that the hidden states need no copy
        labels_BL = F.pad(ids_BL[:, 1:], (0, 1), value=IGNORED)
        taught = teacher is not None and self.beta > 0
        loss: Tensor = fused_linear_kl_distillation(
            hidden_BLD,
            build.head_weight(self.student),
            teacher_hidden_BLD if taught else None,
            build.head_weight(teacher) if taught else None,
            labels_BL,
            kd_weight=self.beta if taught else 0.0,
            ce_weight=1.0,
            temperature=self.temperature,
            scale_by_temperature_squared=True,
            vocab_align="truncate",
            reduction="sum",
            backend=backend_of(self.kernels),
        )
        return loss

    @torch.no_grad()
    def _terms(
        self, ids_BL: Tensor, hidden_BLD: Tensor, total: Tensor, teacher_B: Tensor
    ) -> dict[str, Tensor]:
        ce_sum = self._token_sum(ids_BL, hidden_BLD.detach())
        per_sequence = ids_BL.shape[1] - 1
        terms = {"ce": ce_sum / (len(ids_BL) * per_sequence)}
        if self.beta > 0:
            taught_tokens = (teacher_B >= 0).sum() * per_sequence
            terms["kl"] = (total.detach() - ce_sum) / (self.beta * taught_tokens)
        return terms

    @torch.no_grad()
    def features(
        self, ids_BL: Tensor, teacher_B: Tensor
    ) -> list[tuple[int, list[Tensor], list[Tensor], Mapping[str, Tensor]]]:
        """(teacher, student's stages, its own, tables of a bridge) of the taught sequences, without
        gradient."""
        found = []
        # one pass over the whole batch: a sharded student must be run equally often everywhere
        every_stage = self._run(self.student, ids_BL)[1]
        for owner in torch.unique(teacher_B[teacher_B >= 0]).tolist():
            ids_bL = ids_BL[teacher_B == owner]
            student_stages = [stage[teacher_B == owner] for stage in every_stage]
            patches: Mapping[str, Tensor] = {}
            if self.bridge is not None:
                batch = self.bridge.batch(ids_bL)
                ids_bL, patches = batch.teacher_ids, self.bridge.patches(batch)
            teacher = self.teachers[owner]
            assert isinstance(teacher, nn.Module), "only models have features"
            teacher_stages = self._run(teacher, ids_bL)[1]
            found.append((owner, student_stages, teacher_stages, patches))
        return found


def backend_of(kernels: str) -> str | None:
    """The `backend` argument of every kernel: the automatic choice, or plain torch."""
    if kernels not in ("auto", "reference"):
        raise ValueError(f"run.kernels must be 'auto' or 'reference', got {kernels!r}")
    return None if kernels == "auto" else "reference"
