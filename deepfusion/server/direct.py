"""The third recipe: no students; every proxy teaches the mixture itself.

experts <- K copies of the base's FFN, routers <- directions of the domains
L = L_CE + [affinity > threshold] (beta KL(best proxy) + alpha L_FM)
         + mu L_supervision + lambda L_balance
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..config_tables import DistillConfig, MergeConfig, TuneConfig
from ..data.batches import Packed
from ..metrics import Recorder
from ..ranks import ALONE, Alone
from ..step_checkpoint import StepCheckpoint
from .teaching import Teacher, Teaching
from .tune import train_mixture
from .views import make_views


def direct(
    moe: nn.Module,
    proxies: Sequence[Teacher],
    sequences: Packed,
    affinity_SK: Tensor,
    distill: DistillConfig,
    tune: TuneConfig,
    merge: MergeConfig,
    seed: int,
    *,
    recorder: Recorder,
    checkpoint: StepCheckpoint | None = None,
    kernels: str = "auto",
    ranks: Alone = ALONE,
) -> nn.Module:
    """Trains an upcycled mixture (merge of K equal bases) in place and returns it.

    Weights of the terms and the features' settings come from `distill`, the loop from `tune`;
    sequence s learns from the proxy of its largest affinity [S, K] where that exceeds
    tune.teacher_threshold.
    """
    if affinity_SK.shape != (len(sequences), len(proxies)):
        raise ValueError(
            f"direct: affinity must be [S, K] = [{len(sequences)}, {len(proxies)}], "
            f"got {list(affinity_SK.shape)}"
        )
    views = [
        made
        for index, proxy in enumerate(proxies)
        if (made := make_views(moe, proxy, distill, seed, f"direct-{index}")) is not None
    ]
    teaching = Teaching(
        student=moe,
        teachers=proxies,
        views=views,
        alpha=distill.alpha,
        beta=distill.beta,
        temperature=distill.temperature,
        num_stages=distill.num_stages,
        student_norm=distill.student_norm,
        kernels=kernels,
    )
    train_mixture(
        teaching,
        sequences,
        affinity_SK,
        tune,
        merge,
        seed,
        stage="direct",
        recorder=recorder,
        checkpoint=checkpoint,
        views_steps=distill.vaa_warmup_steps,
        ranks=ranks,
    )
    whole: nn.Module = ranks.whole(moe)
    return whole
