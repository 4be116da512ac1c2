"""One training loop for devices, base, students and MoE.

lr(i) = lr * min(1, (i + 1) / warm-up) * (1 + cos(pi i / steps)) / 2
Muon:   momentum -> nearest orthogonal matrix (Newton-Schulz) -> scaled to AdamW's usual size
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from deepfusion_kernels import fused_linear_kl_distillation, muon_step, orthogonalise

from .config_tables import TrainingConfig
from .data.batches import Packed, stream
from .metrics import Recorder, progress
from .models import build
from .ranks import ALONE, Alone
from .seeding import seed_for
from .step_checkpoint import StepCheckpoint

# Moonlight (arXiv 2502.16982): root mean square of an update as AdamW's, so that one lr serves both
_ADAMW_RMS = 0.2


class Muon(Optimizer):
    """torch.optim.Muon's update of all matrices in one call.

    Parameters [.., A, B]: a 3-D one is a stack of expert matrices, each orthogonalised by itself.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ranks: Alone = ALONE,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients = [parameter.grad for parameter in moved]
            momenta = [self._momentum(parameter) for parameter in moved]
            if self.ranks.size == 1:
                settings = {name: group[name] for name in ("lr", "momentum", "weight_decay")}
                muon_step(moved, gradients, momenta, rms=_ADAMW_RMS, **settings)
                continue
            for parameter, gradient, momentum in zip(moved, gradients, momenta, strict=True):
                momentum.lerp_(gradient, 1 - group["momentum"])
                ahead = torch.lerp(gradient, momentum, group["momentum"])
                update = orthogonalise(self.ranks.gathered(ahead).float())
                rate = group["lr"] * _ADAMW_RMS * math.sqrt(max(parameter.shape[-2:]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(self.ranks.scattered(update, parameter), alpha=-rate)

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        found: Tensor = state["momentum"]
        return found


def matrices_of(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices inside the decoder layers, all the rest) of a model's trained parameters.

    Embeddings, heads, norms, biases and routers are the rest: their rows are not one linear map.
    """
    routers = {
        id(parameter)
        for layer in build.layers(model)
        for name, parameter in layer.named_parameters()
        if name.endswith("gate.weight")
    }
    inside = {id(p) for p in build.layers(model).parameters() if p.ndim >= 2} - routers
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return (
        [parameter for parameter in trained if id(parameter) in inside],
        [parameter for parameter in trained if id(parameter) not in inside],
    )


def make_optimizer(
    name: str,
    matrices: Sequence[nn.Parameter],
    rest: Sequence[nn.Parameter],
    lr: float,
    weight_decay: float = 0.0,
    ranks: Alone = ALONE,
) -> list[Optimizer]:
    """name "muon": Muon on matrices, AdamW on the rest, one lr; "adamw": AdamW on all.

    Weight decay reaches matrices only. Sharded parameters have optimisers of their own.
    """
    if name not in ("muon", "adamw"):
        raise ValueError(f"make_optimizer: optimizer must be 'muon' or 'adamw', got {name!r}")
    optimizers: list[Optimizer] = []
    for group in ranks.alike(matrices):
        optimizers.append(
            Muon(group, lr, weight_decay=weight_decay, ranks=ranks)
            if name == "muon"
            else adamw(group, lr, weight_decay)
        )
    optimizers += [adamw(group, lr) for group in ranks.alike(rest)]
    return optimizers


def adamw(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float, decay: float = 0.0
) -> AdamW:
    """torch's AdamW in its fused form: one pass over each parameter instead of ten."""
    return AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=decay, fused=True)


def lr_at(step: int, steps: int, lr: float, warmup_share: float = 0.03) -> float:
    """Learning rate of a step: linear warm-up, then half a cosine down to zero at `steps`."""
    warmup = max(1, round(warmup_share * steps))
    return lr * min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


LossOf = Callable[[Tensor, int], Mapping[str, Tensor]]


def train_steps(
    modules: Mapping[str, nn.Module],
    optimizers: Sequence[Optimizer],
    batches: Callable[[int], Iterable[Tensor]],
    loss_of: LossOf,
    schedule: TrainingConfig,
    *,
    stage: str,
    seed: int,
    recorder: Recorder,
    checkpoint: StepCheckpoint | None = None,
    ranks: Alone = ALONE,
) -> None:
    """Trains modules in place; killed and called again, it ends in the same bits.

    A parameter group's "lr_scale" multiplies the schedule's rate. batches(start) gives the batches
    from a step on. loss_of(batch, step) returns named terms, of
    which "loss" is minimised; all are recorded. Raises FloatingPointError where the loss is not
    finite.
    """
    start = checkpoint.restore(modules, optimizers) if checkpoint else 0
    recorder.restart(stage, start)
    parameters = [p for one in optimizers for group in one.param_groups for p in group["params"]]
    for module in modules.values():
        module.train()
    left = zip(range(start, schedule.steps), batches(start), strict=False)
    own = () if ranks.first else (ranks.rank,)
    for step, batch in progress(left, stage, schedule.steps - start, quiet=not ranks.first):
        # dropout draws from the global generator: each step has a seed of its own
        torch.manual_seed(seed_for(seed, stage, "step", step, *own))
        terms = loss_of(batch, step)
        means = ranks.mean(terms)
        _expect_finite(means["loss"], stage, step)
        # a loss without a graph has left its gradients behind already
        if terms["loss"].requires_grad:
            torch.autograd.backward(terms["loss"])
        lr = lr_at(step, schedule.steps, schedule.lr, schedule.warmup_share)
        descend(parameters, optimizers, lr, schedule.clip, ranks)
        recorder.record(stage, step, lr=lr, **{name: float(one) for name, one in means.items()})
        if checkpoint is not None and checkpoint.due(step + 1) and step + 1 < schedule.steps:
            checkpoint.save(step + 1, modules, optimizers)
    for module in modules.values():
        module.eval()


def descend(
    parameters: Sequence[nn.Parameter],
    optimizers: Sequence[Optimizer],
    lr: float,
    clip: float,
    ranks: Alone = ALONE,
) -> None:
    """One step along gradients of at most norm `clip`, which are gone afterwards."""
    ranks.clip(parameters, clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train_causal_lm(
    model: nn.Module,
    packed: Packed,
    schedule: TrainingConfig,
    *,
    stage: str,
    seed: int,
    recorder: Recorder,
    checkpoint_path: Path | None = None,
    kernels: str = "auto",
    batches: Callable[[int], Iterable[Tensor]] | None = None,
    loss_of: LossOf | None = None,
) -> None:
    """Trains a model in place on next-token cross entropy: devices, common starts, the base.

    batches, loss_of: instead of the shuffled stream and its mean loss.
    """
    matrices, rest = matrices_of(model)
    optimizers = make_optimizer(
        schedule.optimizer, matrices, rest, schedule.lr, schedule.weight_decay
    )
    device = next(model.parameters()).device
    order = seed_for(seed, stage, "order")
    checkpoint = None
    if checkpoint_path is not None:
        checkpoint = StepCheckpoint(checkpoint_path, schedule.checkpoint_steps)
    train_steps(
        {"model": model},
        optimizers,
        batches
        or (lambda start: stream(packed, schedule.batch_size, schedule.steps, order, start=start)),
        loss_of or (lambda ids, step: {"loss": cross_entropy(model, ids.to(device), kernels)}),
        schedule,
        stage=stage,
        seed=seed,
        recorder=recorder,
        checkpoint=checkpoint,
    )
    if checkpoint is not None:
        # the caller keeps the trained weights; what was saved half-way must not outlive them
        checkpoint.remove()


def _expect_finite(loss: Tensor, stage: str, step: int) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"{stage}: loss must be finite, got {float(loss)} at step {step}; lower its lr"
        )


def cross_entropy(model: nn.Module, ids: Tensor, kernels: str = "auto") -> Tensor:
    """Mean over all next tokens of -ln P(x_t | x_<t); ids [B, L] int64 -> scalar float32.

    kernels: "auto", or "reference" for the plain torch path of the same op.
    """
    hidden = build.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    return fused_linear_kl_distillation(
        hidden[:, :-1],
        build.head_weight(model),
        None,
        None,
        ids[:, 1:],
        kd_weight=0.0,
        ce_weight=1.0,
        backend=None if kernels == "auto" else kernels,
    )
