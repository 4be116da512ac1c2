"""How near public text stands to every cluster, and what is drawn from it.

a_di = cos(l2(e_d - origin), c_i)           origin: what clustering subtracted from the devices
w_s(i) = 1/2 uniform + 1/2 softmax_s(a_si / 0.1)        text for cluster i
w_s = 1 / (sequences of the domain of s)                text that is even over domains
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cluster import Cluster
from .kmeans import unit

# of a small study (docs/method.md); not searched further
SHARPNESS = 0.1
UNIFORM_SHARE = 0.5


def affinity(embeddings: Tensor, clusters: Sequence[Cluster]) -> Tensor:
    """Cosines [rows, K] float32 of text embeddings [rows, r] with the clusters' centres.

    A row without text (all zero) has affinity 0 to every cluster.
    Raises ValueError where the width is not the devices' one.
    """
    width = clusters[0].origin.shape[0]
    if embeddings.ndim != 2 or embeddings.shape[1] != width:
        raise ValueError(
            f"affinity: embeddings must be [rows, {width}], got {list(embeddings.shape)}"
        )
    raw = unit(embeddings.double())
    moved = unit(raw - clusters[0].origin.double())
    moved = torch.where(raw.any(dim=1, keepdim=True), moved, raw)
    centres = torch.stack([found.centre for found in clusters]).double()
    return (moved @ centres.T).float()


def sampling_weights(affinity_S: Tensor) -> Tensor:
    """Probability of each sequence in the text of one cluster: [S] float32, sums to 1."""
    if affinity_S.ndim != 1 or affinity_S.numel() == 0:
        raise ValueError(
            f"sampling_weights: affinity must be [S], S > 0, got {list(affinity_S.shape)}"
        )
    near = torch.softmax(affinity_S.double() / SHARPNESS, dim=0)
    return ((1 - UNIFORM_SHARE) * near + UNIFORM_SHARE / affinity_S.numel()).float()


def balanced_weights(domain_S: Tensor) -> Tensor:
    """Probability of each sequence when every domain is drawn equally often: [S] float32, sums to
    1."""
    counts = torch.bincount(domain_S)
    domains = int((counts > 0).sum())
    return (1.0 / (counts[domain_S].double() * domains)).float()


def best_teacher(affinity_SK: Tensor, threshold: float) -> Tensor:
    """The nearest cluster of each sequence, -1 where its affinity is <= threshold: [S] int64."""
    best = affinity_SK.max(dim=1)
    return torch.where(best.values > threshold, best.indices, torch.full_like(best.indices, -1))


def most_own(affinity_SK: Tensor, per_cluster: int) -> list[Tensor]:
    """For each cluster the sequences nearest to it, those first that lead every other cluster most.

    A cluster that is nobody's nearest gets the one sequence where it falls behind least: never
    empty.
    """
    if affinity_SK.shape[1] == 1:
        lead_SK = affinity_SK - affinity_SK.amin() + 1
    else:
        top = affinity_SK.topk(2, dim=1)
        is_best = affinity_SK == top.values[:, :1]
        lead_SK = affinity_SK - torch.where(is_best, top.values[:, 1:], top.values[:, :1])
    order = lead_SK.argsort(dim=0, descending=True, stable=True)
    counts = (lead_SK > 0).sum(dim=0).clamp(1, per_cluster).tolist()
    return [order[:count, i] for i, count in enumerate(counts)]
