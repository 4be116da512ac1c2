"""Phase III, tune: the mixture's shared parts learn to work together; the experts stay what they
are.

L = L_CE + w_T KL(best proxy) where affinity > threshold + lambda L_balance + mu L_supervision
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config_tables import MergeConfig, TuneConfig
from ..data.batches import Packed
from ..metrics import Recorder
from ..models import experts
from ..ranks import ALONE, Alone
from ..step_checkpoint import StepCheckpoint
from .affinity import balanced_weights, best_teacher
from .agreement import agreed
from .fused import fused_experts
from .lessons import Lessons, batches_of, teach
from .router import RouterTap, balance_loss, supervision_loss
from .teaching import Teacher, Teaching

# who shares it sees the same batches
STREAM = "tune"


def tune(
    moe: nn.Module,
    sequences: Packed,
    config: TuneConfig,
    merge: MergeConfig,
    seed: int,
    *,
    recorder: Recorder,
    teachers: Sequence[Teacher] = (),
    affinity_SK: Tensor | None = None,
    checkpoint: StepCheckpoint | None = None,
    kernels: str = "auto",
    ranks: Alone = ALONE,
) -> nn.Module:
    """Trains the mixture in place on public sequences and returns it.

    tune.train = 'shared' leaves every expert bit for bit as it was. teachers and affinity_SK [S,
    K] are needed by teacher_weight and router_supervision. Raises ValueError where they are
    missing, or where no term could train the router. Source: paper, section III-D.
    """
    taught = len(teachers) > 0 and config.teacher_weight > 0
    teaching = Teaching(
        student=moe,
        teachers=teachers if taught else (),
        beta=config.teacher_weight if taught else 0.0,
        kernels=kernels,
    )
    if config.teacher_weight > 0 and not teachers:
        raise ValueError("tune: tune.teacher_weight > 0 needs the proxies as teachers, got none")
    train_mixture(
        teaching,
        sequences,
        affinity_SK,
        config,
        merge,
        seed,
        stage="tune",
        recorder=recorder,
        checkpoint=checkpoint,
        ranks=ranks,
    )
    whole: nn.Module = ranks.whole(moe)
    return whole


def train_mixture(
    teaching: Teaching,
    sequences: Packed,
    affinity_SK: Tensor | None,
    config: TuneConfig,
    merge: MergeConfig,
    seed: int,
    *,
    stage: str,
    recorder: Recorder,
    checkpoint: StepCheckpoint | None = None,
    views_steps: int = 0,
    ranks: Alone = ALONE,
) -> None:
    """The loop of tune, direct and the centralised control: taught text plus losses on the
    routers."""
    moe = teaching.student
    freeze(moe, config.train, merge)
    _check_router(moe, config)
    lessons = lessons_of(sequences, affinity_SK, teaching, config)
    if config.agreement and teaching.teachers:
        assert affinity_SK is not None, "lessons_of asks for it where there are teachers"
        teaching = agreed(teaching, sequences, affinity_SK, config.teacher_threshold)
    with RouterTap(moe) as tap, fused_experts(moe, teaching.kernels):

        def router_loss(domain_B: Tensor, stands_for: float) -> Tensor:
            loss = domain_B.new_zeros((), dtype=tap.logits[0].dtype)
            if config.balance_loss_weight:
                loss = loss + config.balance_loss_weight * balance_loss(moe, tap)
            if config.router_supervision:
                domain_T = domain_B.repeat_interleave(sequences.ids.shape[1])
                supervision = supervision_loss(moe, tap, domain_T, merge.segments)
                loss = loss + config.router_supervision * stands_for * supervision
            return loss

        wanted = config.balance_loss_weight or config.router_supervision
        teach(
            teaching,
            lessons,
            config,
            seed,
            stage=stage,
            stream=STREAM,
            recorder=recorder,
            checkpoint=checkpoint,
            views_steps=views_steps,
            extra_loss=router_loss if wanted else None,
            before_step=tap.clear,
            ranks=ranks,
        )


def lessons_of(
    sequences: Packed, affinity_SK: Tensor | None, teaching: Teaching, config: TuneConfig
) -> Lessons:
    """Each sequence's best proxy where its affinity exceeds the threshold, and how often it is
    drawn."""
    wants_domains = bool(teaching.teachers) or config.router_supervision > 0
    if wants_domains and (affinity_SK is None or affinity_SK.shape[0] != len(sequences)):
        raise ValueError(
            f"tune: affinity must be [S, K] with S = {len(sequences)} sequences, "
            f"got {None if affinity_SK is None else list(affinity_SK.shape)}"
        )
    if affinity_SK is None:
        teacher_S = sequences.domain.new_full((len(sequences),), -1)
    else:
        teacher_S = best_teacher(affinity_SK, config.teacher_threshold)
    return Lessons(sequences, teacher_S, _weights(sequences, config))


def drawn(sequences: Packed, config: TuneConfig, seed: int) -> Tensor:
    """The rows of `sequences` that tune, direct and the dense control see, ascending."""
    nobody_S = sequences.domain.new_full((len(sequences),), -1)
    lessons = Lessons(sequences, nobody_S, _weights(sequences, config))
    is_drawn_S = torch.zeros(len(sequences), dtype=torch.bool)
    for batch_B in batches_of(lessons, config, seed, STREAM, config.steps)(0):
        is_drawn_S[batch_B] = True
    return is_drawn_S.nonzero().flatten()


def _weights(sequences: Packed, config: TuneConfig) -> Tensor | None:
    """How often each sequence is drawn [S]; None: evenly."""
    return balanced_weights(sequences.domain) if config.balance_text else None


def freeze(moe: nn.Module, train: str, merge: MergeConfig) -> None:
    """Sets what learns: all but the experts ('shared') or all; an idle shared expert never does."""
    if train not in ("shared", "all"):
        raise ValueError(f"tune.train must be 'shared' or 'all', got {train!r}")
    moe.requires_grad_(True)
    for block in experts.moe_blocks(moe):
        block.gate_up.requires_grad_(train == "all")
        block.down.requires_grad_(train == "all")
        if merge.shared == "none":
            block.shared.requires_grad_(False)
            if block.shared_gate is not None:
                block.shared_gate.requires_grad_(False)


def _check_router(moe: nn.Module, config: TuneConfig) -> None:
    if not experts.has_constant_weights(moe):
        return
    if not config.balance_loss_weight and not config.router_supervision:
        raise ValueError(
            "tune: merge.top_k = 1 with merge.renormalize gives the router no gradient; set "
            "tune.balance_loss_weight > 0 (0.01), or merge.top_k = 2"
        )
    warnings.warn(
        "one expert of weight 1 per token: only the router losses train the router", stacklevel=3
    )
