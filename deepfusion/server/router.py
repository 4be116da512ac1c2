"""What the routers say while a model runs: their logits and choices, layer by layer, and losses on
them.

P_t = softmax(z_t), or sigmoid(z_t) / sum sigmoid(z_t) for sigmoid routers
balance = mean_l E sum_e f_e P_e         f_e = slots of e / tokens,  P_e = mean_t P_te
supervision = mean_l mean_t -ln sum_{e in domain of t} P_te
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..models import experts


class RouterTap:
    """Collects (logits [T, E], chosen experts [T, K]) of every router; with `inputs`, what they
    read.

    Logits keep their graph: losses on them train the routers.
    """

    def __init__(self, moe: nn.Module, inputs: bool = False) -> None:
        self.routers = experts.routers(moe)
        if not self.routers:
            raise ValueError("RouterTap: the model must hold at least one router, got none")
        self.keep_inputs = inputs
        self.hooks: list[Any] = []
        self.clear()

    def clear(self) -> None:
        """Forgets what was collected: call it before each forward pass."""
        self.logits: list[Tensor] = []
        self.experts: list[Tensor] = []
        self.inputs: list[Tensor] = []

    def __enter__(self) -> RouterTap:
        self.hooks = [router.register_forward_hook(self._collect) for router in self.routers]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self.hooks:
            hook.remove()

    def _collect(
        self, router: nn.Module, arguments: tuple[Any, ...], result: tuple[Any, ...]
    ) -> None:
        self.logits.append(result[0])
        self.experts.append(result[2])
        if self.keep_inputs:
            self.inputs.append(arguments[0].detach().flatten(0, -2))


def balance_loss(moe: nn.Module, tap: RouterTap) -> Tensor:
    """The mean over layers; uniform routing gives the number of experts per token."""
    losses = []
    for logits_TE, experts_TK in zip(tap.logits, tap.experts, strict=True):
        T, E = logits_TE.shape
        f_E = torch.bincount(experts_TK.flatten(), minlength=E) / T
        losses.append(E * (f_E * experts.router_probabilities(moe, logits_TE).mean(dim=0)).sum())
    return torch.stack(losses).mean()


def supervision_loss(moe: nn.Module, tap: RouterTap, domain_T: Tensor, segments: int) -> Tensor:
    """Cross entropy of the routers against each token's domain; -1 tokens are left out.

    Experts i*segments .. (i+1)*segments - 1 belong to domain i. 0 where no token has a domain.
    """
    known_N = (domain_T >= 0).nonzero()[:, 0]
    if known_N.numel() == 0:
        return torch.zeros((), device=domain_T.device)
    wanted_N1 = domain_T[known_N][:, None]
    losses = []
    for logits_TE in tap.logits:
        P_NE = experts.router_probabilities(moe, logits_TE[known_N])
        P_NI = P_NE.view(len(P_NE), -1, segments).sum(dim=2)
        losses.append(-P_NI.gather(1, wanted_N1).clamp(min=1e-20).log().mean())
    return torch.stack(losses).mean()
