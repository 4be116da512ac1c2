"""Phase I: devices of like knowledge, and one proxy model for each group.

e_n' = l2(e_n - mean e)         (center; the raw e_n where that is zero)
C_1..C_K = spherical k-means of the e_n' inside every architecture
p_i = sum_{n in C_i} w_n m_n    w_n = 1/|C_i|, or tokens_n / sum tokens; or server/robust.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import seeding
from ..config_tables import ClusterConfig
from ..messages import DeviceUpdate
from .kmeans import spherical_kmeans
from .robust import Average, LoadState, robust_average, rule_of

SILHOUETTE_POINTS = 2000  # of an architecture: the figure costs their square


@dataclass(frozen=True)
class Cluster:
    """One domain: its devices, their centre [r] in the space where they were clustered, the mean
    model.

    `origin` [r] is what was subtracted from every raw embedding before clustering (zero without
    centring).
    """

    index: int
    architecture: str
    members: tuple[str, ...]
    centre: Tensor
    origin: Tensor
    proxy: dict[str, Tensor]


@dataclass(frozen=True)
class Group:
    """Uploads of one cell, ordered by device, and its centre [r] in the clustering space."""

    members: tuple[DeviceUpdate, ...]
    centre: Tensor
    origin: Tensor


def cluster(
    updates: Sequence[DeviceUpdate],
    load_state: LoadState,
    config: ClusterConfig,
    seed: int,
    average: Average | None = None,
) -> list[Cluster]:
    """Groups uploads inside each architecture and averages every group; ordered by smallest device
    id.

    load_state gives an upload's tensors, one device at a time; average makes a proxy of a cluster's
    devices, by default as cluster.robust says. Raises ValueError unless A <= num_clusters <= N for
    A architectures and N uploads.
    """
    average = average or robust_average(config.robust)
    found = []
    for index, cell in enumerate(group(updates, config, seed)):
        found.append(
            Cluster(
                index=index,
                architecture=cell.members[0].architecture,
                members=tuple(update.device for update in cell.members),
                centre=cell.centre.float(),
                origin=cell.origin.float(),
                proxy=average(cell.members, load_state, config.weights),
            )
        )
    return found


def group(updates: Sequence[DeviceUpdate], config: ClusterConfig, seed: int) -> list[Group]:
    """The cells of like knowledge inside each architecture, ordered by smallest device id."""
    devices = sorted(updates, key=lambda update: update.device)
    twice = [one.device for one, next_one in pairwise(devices) if one.device == next_one.device]
    if twice:
        raise ValueError(f"cluster: every device may send one update, {twice[0]} sent more")
    points, origin = clustering_space(devices, config.center)
    rows: dict[str, list[int]] = {}
    for row, update in enumerate(devices):
        rows.setdefault(update.architecture, []).append(row)
    shares = share_out({name: len(inside) for name, inside in rows.items()}, config.num_clusters)

    cells: list[tuple[list[int], Tensor]] = []
    for name in sorted(rows):
        generator = seeding.generator(seed, "cluster", name)
        own, centres, _ = spherical_kmeans(
            points[rows[name]], shares[name], config.restarts, generator
        )
        inside: list[list[int]] = [[] for _ in range(shares[name])]
        for row, owner in zip(rows[name], own.tolist(), strict=True):
            inside[owner].append(row)
        cells += zip(inside, centres, strict=True)
    cells.sort(key=lambda cell: cell[0][0])
    return [Group(tuple(devices[row] for row in own), centre, origin) for own, centre in cells]


def clustering_space(devices: Sequence[DeviceUpdate], center: bool) -> tuple[Tensor, Tensor]:
    """Unit points [N, r] in float64 and the origin [r] that was subtracted."""
    # in place: at 10^5 devices every copy of the points is 200 MB
    points = torch.stack([update.embedding for update in devices]).double()
    points /= points.norm(dim=1, keepdim=True).clamp_min(1e-12)
    origin = points.mean(dim=0) if center else torch.zeros_like(points[0])
    points -= origin
    is_left = points.norm(dim=1) <= 1e-9
    # NOTE: a lone device, or equal ones, move to zero, where no direction is left; they keep the
    # raw one
    points[is_left] += origin
    points /= points.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return points, origin


def share_out(sizes: Mapping[str, int], num_clusters: int) -> dict[str, int]:
    """Clusters of each architecture: at least 1, at most its devices, else by largest remainder.

    Raises ValueError unless A <= num_clusters <= N; ties go by architecture name.
    """
    total = sum(sizes.values())
    if not len(sizes) <= num_clusters <= total:
        raise ValueError(
            f"cluster: num_clusters must reach from the number of architectures to that of good "
            f"uploads, {len(sizes)} <= num_clusters <= {total}, got {num_clusters}"
        )
    quotas = {name: num_clusters * count / total for name, count in sizes.items()}
    shares = {name: min(max(1, int(quotas[name])), count) for name, count in sizes.items()}
    while sum(shares.values()) < num_clusters:
        open_names = [name for name in sorted(sizes) if shares[name] < sizes[name]]
        shares[max(open_names, key=lambda name: quotas[name] - shares[name])] += 1
    while sum(shares.values()) > num_clusters:
        # the floor of 1 can hand out too many; the largest excess over its quota gives back
        large = [name for name in sorted(sizes) if shares[name] > 1]
        shares[max(large, key=lambda name: shares[name] - quotas[name])] -= 1
    return shares


def clustering_facts(
    clusters: Sequence[Cluster],
    updates: Sequence[DeviceUpdate],
    labels: Mapping[str, str] | None = None,
    robust: str = "none",
) -> dict[str, Any]:
    """What clusters.json holds: members, objective, silhouette, and the adjusted Rand index to
    `labels`.

    The silhouette (cosine distance) is taken inside each architecture, as the clusters are; None
    where no architecture has it defined: one cluster, or one per device. It is taken on at most
    SILHOUETTE_POINTS devices of each, evenly spaced. robust: cluster.robust, told per cluster as it
    really applied.
    """
    from sklearn.metrics import adjusted_rand_score

    devices = sorted(updates, key=lambda update: update.device)
    cell_of = {name: found.index for found in clusters for name in found.members}
    points, _ = clustering_space(devices, bool(clusters[0].origin.any()))
    cells = [cell_of[update.device] for update in devices]
    centres = torch.stack([found.centre for found in clusters]).double()
    sums = torch.zeros_like(centres).index_add(0, torch.tensor(cells), points)
    truth = [labels[update.device] for update in devices] if labels is not None else None
    return {
        "clusters": [
            {
                "index": c.index,
                "architecture": c.architecture,
                "members": list(c.members),
                "robust": rule_of(robust, len(c.members)),
            }
            for c in clusters
        ],
        "robust": robust,
        "objective": float((sums * centres).sum()),
        "silhouette": _silhouette(points, cells, [update.architecture for update in devices]),
        "adjusted_rand_index": float(adjusted_rand_score(truth, cells)) if truth else None,
    }


def _silhouette(points: Tensor, cells: Sequence[int], kinds: Sequence[str]) -> float | None:
    from sklearn.metrics import silhouette_samples

    values: list[float] = []
    for kind in sorted(set(kinds)):
        inside = [row for row, own in enumerate(kinds) if own == kind]
        inside = inside[:: -(-len(inside) // SILHOUETTE_POINTS)]
        labels = [cells[row] for row in inside]
        if 1 < len(set(labels)) < len(labels):
            values += silhouette_samples(points[inside].numpy(), labels, metric="cosine").tolist()
    return sum(values) / len(values) if values else None
