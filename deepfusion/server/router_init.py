"""First weights of the routers: noise, or the directions in which the domains' hidden states
differ.

    normal     r_i ~ N(0, 0.02^2)
    centroids  r_i = gamma unit((I - u u^T)(h_i - h))       h_i = mean router input on domain i's
    text,
               h = mean of the h_i, u = unit(h), gamma: mean variance of the logits over tokens is 1

The m rows of a domain start equal. The common part r_i . h must go: it would rank the domains
alike for every token, whatever the token says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import seeding
from ..config_tables import MergeConfig
from ..models import build, experts
from .affinity import most_own
from .fused import fused_experts
from .kmeans import unit
from .router import RouterTap

NOISE = 0.02
# 64 sequences of 128 tokens per domain: means of a few thousand tokens are steady enough
SEQUENCES_PER_DOMAIN = 64


@dataclass(frozen=True)
class RouterText:
    """Public sequences ids [S, L] and their affinity [S, K] to every domain."""

    ids: Tensor
    affinity: Tensor


def init_routers(
    moe: nn.Module,
    config: MergeConfig,
    num_domains: int,
    seed: int,
    text: RouterText | None,
    kernels: str = "auto",
) -> None:
    """Fills every router's weight [K m, D] as merge.router_init says. Raises ValueError without
    its text."""
    if config.router_init == "normal":
        for layer, router in enumerate(experts.routers(moe)):
            weight_ED = router.get_parameter("weight")
            generator = seeding.generator(seed, "merge", "router", layer)
            rows_KD = NOISE * torch.randn(num_domains, weight_ED.shape[1], generator=generator)
            _fill(weight_ED, rows_KD, config.segments)
    elif config.router_init == "centroids":
        if text is None or text.affinity.shape[1] != num_domains:
            raise ValueError(
                "merge.router_init = 'centroids' needs public text with affinities to "
                f"{num_domains} domains"
            )
        _centroids(moe, config.segments, text, kernels)
    else:
        raise ValueError(
            f"merge.router_init must be 'normal' or 'centroids', got {config.router_init!r}"
        )


def _fill(weight_ED: Tensor, rows_KD: Tensor, segments: int) -> None:
    with torch.no_grad():
        weight_ED.copy_(rows_KD.repeat_interleave(segments, dim=0))


@torch.no_grad()
def _centroids(moe: nn.Module, segments: int, text: RouterText, kernels: str) -> None:
    picks = most_own(text.affinity, SEQUENCES_PER_DOMAIN)
    # running sums: all hidden states at once would not fit for a large base
    with _uniform_routing(moe), fused_experts(moe, kernels):
        domains = [_moments(moe, text.ids[pick]) for pick in picks]
    means_LKD = torch.stack([one.sum_LD / one.tokens for one in domains], dim=1)
    overall_LD = means_LKD.mean(dim=1)
    rows_LKD = means_LKD - overall_LD[:, None]
    along_LD = unit(overall_LD)
    rows_LKD -= (rows_LKD @ along_LD[:, :, None]) * along_LD[:, None]
    # equal domains leave rounding errors, not directions: rows of zero route evenly
    apart = rows_LKD.norm(dim=2, keepdim=True) > 1e-5 * means_LKD.norm(dim=2, keepdim=True)
    rows_LKD = torch.where(apart, unit(rows_LKD), 0.0)
    gamma_L = _gain(rows_LKD, domains)
    for router, rows_KD, gamma in zip(experts.routers(moe), rows_LKD, gamma_L, strict=True):
        _fill(router.get_parameter("weight"), rows_KD * float(gamma), segments)


@dataclass(frozen=True)
class _Moments:
    """Sums over the tokens of one domain: h [L, D] and h h^T [L, D, D], in float64."""

    tokens: int
    sum_LD: Tensor
    square_LDD: Tensor


def _moments(moe: nn.Module, ids_SL: Tensor, batch_size: int = 16) -> _Moments:
    """Of what every router reads on this text."""
    layers = len(experts.routers(moe))
    sum_L: list[Tensor | float] = [0.0] * layers
    square_L: list[Tensor | float] = [0.0] * layers
    with RouterTap(moe, inputs=True) as tap:
        for ids_BL in torch.split(ids_SL, batch_size):
            tap.clear()
            build.backbone(moe)(ids_BL, use_cache=False)
            for layer, h in enumerate(tap.inputs):
                h_TD = h.float()
                sum_L[layer] = sum_L[layer] + h_TD.double().sum(dim=0)
                square_L[layer] = square_L[layer] + (h_TD.T @ h_TD).double()
    return _Moments(ids_SL.numel(), _stacked(sum_L), _stacked(square_L))


def _stacked(parts: Sequence[Tensor | float]) -> Tensor:
    return torch.stack([torch.as_tensor(one) for one in parts])


def _gain(rows_LKD: Tensor, domains: Sequence[_Moments]) -> Tensor:
    """gamma [L]: over all tokens, the variance of the logits is 1 on the mean of the rows."""
    tokens = sum(one.tokens for one in domains)
    mean_LD = torch.stack([one.sum_LD for one in domains]).sum(dim=0) / tokens
    square_LDD = torch.stack([one.square_LDD for one in domains]).sum(dim=0) / tokens
    squares_LK = ((rows_LKD @ square_LDD) * rows_LKD).sum(dim=2)
    means_LK = (rows_LKD @ mean_LD[:, :, None])[:, :, 0]
    variance_L = (squares_LK - means_LK.square()).mean(dim=1)
    return torch.where(variance_L > 0, variance_L.clamp(min=1e-30).rsqrt(), 0.0)


@contextmanager
def _uniform_routing(moe: nn.Module) -> Iterator[None]:
    """Every token to every expert with equal weight, so that no domain's states are preferred."""
    routers = experts.routers(moe)
    kept = [int(router.top_k) for router in routers]  # type: ignore[arg-type]
    for router in routers:
        weight_ED = router.get_parameter("weight")
        weight_ED.data.zero_()
        router.top_k = weight_ED.shape[0]  # type: ignore[assignment]
    try:
        yield
    finally:
        for router, top_k in zip(routers, kept, strict=True):
            router.top_k = top_k  # type: ignore[assignment]
