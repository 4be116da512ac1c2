"""The loop that every taught student goes through: views first, then all terms together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .. import seeding
from ..config_tables import TrainingConfig
from ..data.batches import Packed, rows
from ..metrics import Recorder
from ..ranks import ALONE, Alone
from ..step_checkpoint import StepCheckpoint
from ..training import make_optimizer, matrices_of, train_steps
from .teaching import Teaching

# of a small study (docs/method.md): views that start untrained push the student astray
VIEWS_LR = 2e-3


@dataclass(frozen=True)
class Lessons:
    """Public sequences, who teaches each [S] (-1: nobody), how often each is drawn [S] (None:
    evenly)."""

    sequences: Packed
    teacher: Tensor
    weights: Tensor | None = None


# the teachers [B] of this process's rows, and by how much they stand for the batch's taught ones
ExtraLoss = Callable[[Tensor, float], Tensor]


def teach(
    teaching: Teaching,
    lessons: Lessons,
    config: TrainingConfig,
    seed: int,
    *,
    stage: str,
    stream: str,
    recorder: Recorder,
    checkpoint: StepCheckpoint | None = None,
    views_steps: int = 0,
    extra_loss: ExtraLoss | None = None,
    before_step: Callable[[], None] | None = None,
    ranks: Alone = ALONE,
) -> None:
    """Trains teaching.student (and its views) in place on `config.steps` batches.

    Stages of one `stream` and seed see the same batches. extra_loss gets the teachers [B] of the
    batch in the order in which the student saw it. Killed and called again, it ends in the same
    bits. With more than one process the student stays sharded: `ranks.whole` puts it together.
    """
    ids_SL = lessons.sequences.ids
    ranks.shard(teaching.student)
    resumed = checkpoint is not None and checkpoint.saved() is not None
    if views_steps and teaching.stages and not resumed:
        _warm_views(teaching, lessons, config, seed, views_steps, stage, recorder, ranks)

    def loss_of(rows_B: Tensor, step: int) -> dict[str, Tensor]:
        if before_step is not None:
            before_step()
        taught = int((lessons.teacher[rows_B] >= 0).sum())
        rows_B = ranks.part(rows_B)
        # sorted by teacher: sequences of one teacher are one block, without a copy
        rows_B = rows_B[lessons.teacher[rows_B].argsort(stable=True)]
        teacher_B = lessons.teacher[rows_B]
        terms = teaching.loss(ids_SL[rows_B], teacher_B, step, rows_B)
        if extra_loss is not None:
            stands_for = int((teacher_B >= 0).sum()) * ranks.size / max(1, taught)
            extra = extra_loss(teacher_B, stands_for)
            terms |= {"loss": terms["loss"] + extra, "router": extra.detach()}
        return terms

    modules: dict[str, nn.Module] = {"student": teaching.student}
    if teaching.stages:
        modules["views"] = nn.ModuleList(teaching.views)
    train_steps(
        modules,
        _optimizers(teaching, config, ranks),
        batches_of(lessons, config, seed, stream, config.steps),
        loss_of,
        config,
        stage=stage,
        seed=seed,
        recorder=recorder,
        checkpoint=checkpoint,
        ranks=ranks,
    )


def _optimizers(teaching: Teaching, config: TrainingConfig, ranks: Alone) -> list[Optimizer]:
    """Of the student, and of its views where features are compared."""
    matrices, rest = matrices_of(teaching.student)
    optimizers = make_optimizer(
        config.optimizer, matrices, rest, config.lr, config.weight_decay, ranks
    )
    if teaching.stages:
        views = [parameter for view in teaching.views for parameter in view.parameters()]
        # Muon's rates are ten times what AdamW bears on the views
        calm = {"params": views, "lr_scale": min(1.0, VIEWS_LR / config.lr)}
        optimizers.append(AdamW([calm], config.lr, weight_decay=0.0, fused=True))
    return optimizers


def batches_of(
    lessons: Lessons, config: TrainingConfig, seed: int, stream: str, steps: int
) -> Callable[[int], Iterable[Tensor]]:
    """The rows [B] of every batch from a step on; one stream and seed see the same ones."""
    stream_seed = seeding.seed_for(seed, stream)

    def batches(start: int) -> Iterable[Tensor]:
        return rows(
            len(lessons.sequences),
            config.batch_size,
            steps,
            stream_seed,
            weights=lessons.weights,
            start=start,
        )

    return batches


def _warm_views(
    teaching: Teaching,
    lessons: Lessons,
    config: TrainingConfig,
    seed: int,
    steps: int,
    stage: str,
    recorder: Recorder,
    ranks: Alone,
) -> None:
    """Trains the views alone, on features of the student as it is."""
    views = nn.ModuleList(teaching.views)
    optimizers: list[Optimizer] = [
        AdamW(views.parameters(), VIEWS_LR, weight_decay=0.0, fused=True)
    ]
    ids_SL = lessons.sequences.ids
    taught_S = torch.where(lessons.teacher >= 0, 1.0, 0.0)
    if not taught_S.any():
        return
    weights_S = taught_S if lessons.weights is None else taught_S * lessons.weights

    def loss_of(rows_B: Tensor, step: int) -> dict[str, Tensor]:
        rows_B = ranks.part(rows_B)
        teacher_B = lessons.teacher[rows_B]
        losses = [
            teaching.feature_loss(*one) * ((teacher_B == one[0]).sum() / len(rows_B))
            for one in teaching.features(ids_SL[rows_B], teacher_B)
        ]
        return {"loss": torch.stack(losses).sum()}

    train_steps(
        {"views": views},
        optimizers,
        batches_of(
            Lessons(lessons.sequences, lessons.teacher, weights_S),
            config,
            seed,
            f"{stage}.views",
            steps,
        ),
        loss_of,
        replace(config, steps=steps, lr=VIEWS_LR),
        stage=f"{stage}.views",
        seed=seed,
        recorder=recorder,
        ranks=ranks,
    )
