"""Phase II: one cluster's proxy teaches one copy of the dense base.

L = L_CE + alpha L_FM + beta tau^2 KL(P^proxy || P^student)        on public text
    (across tokenizers the KL is what the bridge says)
text: every sequence alike, or half of it by affinity to the cluster
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config_tables import DistillConfig
from ..data.batches import Packed
from ..metrics import Recorder
from ..step_checkpoint import StepCheckpoint
from .affinity import sampling_weights
from .bridge import Bridge
from .lessons import Lessons, teach
from .teaching import Teacher, Teaching
from .views import make_views


def distill(
    proxy: Teacher,
    base: nn.Module,
    sequences: Packed,
    affinity_S: Tensor | None,
    config: DistillConfig,
    seed: int,
    *,
    stage: str,
    recorder: Recorder,
    checkpoint: StepCheckpoint | None = None,
    kernels: str = "auto",
    bridge: Bridge | None = None,
) -> nn.Module:
    """Trains `base` in place towards `proxy` on public sequences and returns it; the proxy is
    frozen.

    bridge: for a proxy of another tokenizer. affinity_S [S] is each sequence's cosine with the
    cluster; needed by distill.sampling = 'affinity'. Every cluster of one seed sees the same
    uniform stream. Raises ValueError where proxy and base cannot be compared, or the affinity is
    missing. Source: paper, equations 5 to 11.
    """
    weights_S = None
    if config.sampling == "affinity":
        if affinity_S is None or affinity_S.shape != (len(sequences),):
            raise ValueError(
                f"distill: affinity must be [S] = [{len(sequences)}] for sampling = 'affinity', "
                f"got {None if affinity_S is None else list(affinity_S.shape)}"
            )
        weights_S = sampling_weights(affinity_S)
    views = make_views(base, proxy, config, seed, stage)
    teaching = Teaching(
        student=base,
        teachers=[proxy],
        views=[] if views is None else [views],
        alpha=config.alpha,
        beta=config.beta,
        temperature=config.temperature,
        num_stages=config.num_stages,
        student_norm=config.student_norm,
        kernels=kernels,
        bridge=bridge,
    )
    lessons = Lessons(sequences, torch.zeros(len(sequences), dtype=torch.int64), weights_S)
    teach(
        teaching,
        lessons,
        config,
        seed,
        stage=stage,
        stream="distill",
        recorder=recorder,
        checkpoint=checkpoint,
        views_steps=config.vaa_warmup_steps,
    )
    return base
