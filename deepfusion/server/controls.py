"""Models that say what the method is worth: same text, same steps, without one of its parts.

dense         the base itself, on the stream and with the teachers that the mixture has
centralised   the same mixture on the text of all devices and the server: what privacy costs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..config import Config
from ..config_tables import DistillConfig, MergeConfig, TrainingConfig, TuneConfig
from ..data.batches import Packed
from ..metrics import Recorder
from ..step_checkpoint import StepCheckpoint
from .lessons import teach
from .teaching import Teacher, Teaching
from .tune import STREAM, lessons_of, train_mixture


def server_steps(config: Config, num_clusters: int) -> int:
    """Optimiser steps of all server stages of the recipe together: what a control may spend."""
    if config.run.recipe == "direct":
        return config.tune.steps
    return num_clusters * config.distill.steps + config.tune.steps


def dense_control(
    base: nn.Module,
    proxies: Sequence[Teacher],
    sequences: Packed,
    affinity_SK: Tensor,
    distill: DistillConfig,
    tune: TuneConfig,
    loop: TrainingConfig,
    seed: int,
    *,
    recorder: Recorder,
    checkpoint: StepCheckpoint | None = None,
    kernels: str = "auto",
) -> nn.Module:
    """One dense model taught by every proxy, in place: CE + beta KL to the best one per sequence.

    `loop` has the steps, the rate and the batch; threshold and text are tune's. A mixture that
    does not beat this one has bought nothing.
    """
    teaching = Teaching(
        student=base,
        teachers=proxies,
        beta=distill.beta,
        temperature=distill.temperature,
        kernels=kernels,
    )
    teach(
        teaching,
        lessons_of(sequences, affinity_SK, teaching, tune),
        loop,
        seed,
        stage="control.dense",
        stream=STREAM,
        recorder=recorder,
        checkpoint=checkpoint,
    )
    return base


def centralised_control(
    moe: nn.Module,
    sequences: Packed,
    config: TuneConfig,
    merge: MergeConfig,
    seed: int,
    *,
    steps: int,
    recorder: Recorder,
    checkpoint: StepCheckpoint | None = None,
    kernels: str = "auto",
) -> nn.Module:
    """The mixture on everybody's text, in place, all weights trained: CE + lambda L_balance.

    `sequences` holds the private text of all devices and the public text; nobody teaches.
    """
    pooled = replace(config, steps=steps, train="all", teacher_weight=0.0, router_supervision=0.0)
    train_mixture(
        Teaching(student=moe, kernels=kernels),
        sequences,
        None,
        replace(pooled, balance_text=False),
        merge,
        seed,
        stage="control.centralised",
        recorder=recorder,
        checkpoint=checkpoint,
    )
    return moe
