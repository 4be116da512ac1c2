"""Where a mixture of experts sends its tokens: load of every expert and sharpness of every router.

load_le = share of the routed slots of layer l that go to expert e          (a row sums to 1)
entropy_l = mean over tokens of -sum_e P_e ln P_e      P = normalised router scores; ln E is uniform
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.batches import Packed
from ..models import build, experts
from .router import RouterTap


@dataclass(frozen=True)
class RoutingFacts:
    """load [layers, E], entropy [layers] in nats; float64."""

    load: Tensor
    entropy: Tensor


@torch.no_grad()
def expert_load(
    moe: nn.Module, packed_by_domain: Mapping[str, Packed], batch_size: int
) -> dict[str, RoutingFacts]:
    """Routing of every domain's text; one forward pass over it."""
    was_training = moe.training
    moe.eval()
    facts = {name: _facts(moe, packed.ids, batch_size) for name, packed in packed_by_domain.items()}
    moe.train(was_training)
    return facts


def _facts(moe: nn.Module, ids_SL: Tensor, batch_size: int) -> RoutingFacts:
    counts_LE, entropy_L, tokens = torch.zeros(()), torch.zeros(()), 0
    with RouterTap(moe) as tap:
        for ids_BL in torch.split(ids_SL, batch_size):
            tap.clear()
            build.backbone(moe)(ids_BL, use_cache=False)
            probabilities = [experts.router_probabilities(moe, logits) for logits in tap.logits]
            counts_LE = (
                counts_LE
                + torch.stack(
                    [
                        torch.bincount(chosen.flatten(), minlength=P_TE.shape[1])
                        for chosen, P_TE in zip(tap.experts, probabilities, strict=True)
                    ]
                ).double()
            )
            entropy_L = entropy_L + torch.stack(
                [torch.special.entr(P_TE.double()).sum() for P_TE in probabilities]
            )
            tokens += ids_BL.numel()
    return RoutingFacts(counts_LE / counts_LE.sum(dim=1, keepdim=True), entropy_L / tokens)
