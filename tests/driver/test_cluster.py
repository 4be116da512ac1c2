"""Clustering and proxies: exact identities on toy devices."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from deepfusion.config_tables import ClusterConfig
from deepfusion.server.affinity import (
    affinity,
    balanced_weights,
    best_teacher,
    most_own,
    sampling_weights,
)
from deepfusion.server.cluster import cluster, clustering_facts, share_out
from deepfusion.server.kmeans import spherical_kmeans, unit
from deepfusion.server.proxy import mean_state

SEED = 7


@dataclass(frozen=True)
class Upload:
    """What the server reads of a DeviceUpdate."""

    device: str
    architecture: str
    embedding: Tensor
    tokens: int = 100


def state_of(upload: Upload) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(sum(map(ord, upload.device)))
    head = torch.randn(5, 3, generator=draw)
    return {
        "embed": head,
        "head": head,
        "norm": torch.randn(3, generator=draw),
        "steps": torch.tensor(3),
    }


def toy_devices(topics: int = 3, each: int = 4) -> list[Upload]:
    """Well-separated topics round a strong common direction, two architectures alternating."""
    draw = torch.Generator().manual_seed(0)
    centres, common = torch.randn(topics, 16, generator=draw), 3 * torch.randn(16, generator=draw)
    return [
        Upload(
            f"device-{n:02}",
            "llama" if n % 2 else "gpt2",
            unit(common + centres[(n // 2) % topics] + 0.05 * torch.randn(16, generator=draw)),
            tokens=100 + n,
        )
        for n in range(topics * each)
    ]


@pytest.mark.parametrize("center", [True, False])
def test_separated_topics_are_recovered(center: bool) -> None:
    uploads = toy_devices()
    found = cluster(uploads, state_of, ClusterConfig(num_clusters=6, center=center), SEED)
    topics = {u.device: f"{u.architecture}/{(n // 2) % 3}" for n, u in enumerate(uploads)}
    facts = clustering_facts(found, uploads, topics)
    assert facts["adjusted_rand_index"] == 1.0
    assert facts["silhouette"] > (0.9 if center else 0.4)
    assert facts["objective"] == pytest.approx(sum(float(len(c.members)) for c in found), abs=0.2)


def test_permuted_uploads_give_the_same_clusters() -> None:
    uploads = toy_devices()
    config = ClusterConfig(num_clusters=5)
    straight = cluster(uploads, state_of, config, SEED)
    shuffled = cluster(uploads[::-1][3:] + uploads[::-1][:3], state_of, config, SEED)
    assert [c.members for c in straight] == [c.members for c in shuffled]
    for one, other in zip(straight, shuffled, strict=True):
        assert torch.equal(one.centre, other.centre)
        assert all(torch.equal(one.proxy[name], other.proxy[name]) for name in one.proxy)


def test_renamed_devices_keep_their_company() -> None:
    uploads = toy_devices()
    config = ClusterConfig(num_clusters=6)
    renamed = [replace(u, device=f"device-{(7 * n) % 12:02}") for n, u in enumerate(uploads)]
    names = {new.device: old.device for old, new in zip(uploads, renamed, strict=True)}
    straight = {frozenset(c.members) for c in cluster(uploads, state_of, config, SEED)}
    other = cluster(renamed, state_of, config, SEED)
    assert {frozenset(names[name] for name in c.members) for c in other} == straight


def test_as_many_clusters_as_devices_gives_singletons_bit_for_bit() -> None:
    uploads = toy_devices(2, 3)
    found = cluster(uploads, state_of, ClusterConfig(num_clusters=6), SEED)
    assert [c.members for c in found] == [(u.device,) for u in uploads]
    for one, upload in zip(found, uploads, strict=True):
        state = state_of(upload)
        assert all(torch.equal(one.proxy[name], state[name]) for name in state)


def test_clusters_are_in_order_of_their_first_device_and_pure() -> None:
    uploads = toy_devices()
    found = cluster(uploads, state_of, ClusterConfig(num_clusters=7), SEED)
    assert [c.index for c in found] == list(range(7))
    firsts = [c.members[0] for c in found]
    assert firsts == sorted(firsts)
    assert all(list(c.members) == sorted(c.members) for c in found)
    kind = {u.device: u.architecture for u in uploads}
    assert all({kind[name] for name in c.members} == {c.architecture} for c in found)


def test_proxy_is_the_mean_of_its_members() -> None:
    uploads = toy_devices()[:3]
    states = [state_of(u) for u in uploads]
    uniform = mean_state(uploads, state_of)
    truth = torch.stack([s["norm"].double() for s in states]).mean(0)
    torch.testing.assert_close(uniform["norm"].double(), truth, rtol=0, atol=1e-6)
    weighted = mean_state(uploads, state_of, "tokens")
    shares = torch.tensor([u.tokens for u in uploads], dtype=torch.float64)
    truth = (
        torch.stack([s["norm"].double() for s in states]) * (shares / shares.sum())[:, None]
    ).sum(0)
    torch.testing.assert_close(weighted["norm"].double(), truth, rtol=0, atol=1e-6)
    assert uniform["embed"] is uniform["head"], "tied weights stay one tensor"
    assert uniform["steps"].dtype == torch.int64


@pytest.mark.parametrize("count", [2, 3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_of_equal_models_is_the_model_bit_for_bit(count: int, dtype: torch.dtype) -> None:
    uploads = toy_devices()[:count]
    weight = torch.randn(64, 64).to(dtype)
    mean = mean_state(uploads, lambda _: {"w": weight})["w"]
    assert mean.dtype == dtype
    assert torch.equal(mean, weight)


def test_unequal_integer_buffers_names_and_shapes_are_refused() -> None:
    uploads = toy_devices()[:2]
    states = iter([{"n": torch.tensor(1)}, {"n": torch.tensor(2)}])
    with pytest.raises(ValueError, match="device-01: integer tensor 'n' differs"):
        mean_state(uploads, lambda _: next(states))
    states = iter([{"n": torch.ones(1)}, {"m": torch.ones(1)}])
    with pytest.raises(ValueError, match="device-01 must hold the tensors of device-00"):
        mean_state(uploads, lambda _: next(states))
    states = iter([{"n": torch.ones(1)}, {"n": torch.ones(2)}])
    with pytest.raises(ValueError, match=r"tensor 'n' must be \[1\], got \[2\]"):
        mean_state(uploads, lambda _: next(states))


@pytest.mark.parametrize("total", range(3, 15))
def test_shares_sum_to_k_and_stay_in_bounds(total: int) -> None:
    sizes = {"a": 1, "b": 4, "c": 9}
    shares = share_out(sizes, total)
    assert sum(shares.values()) == total
    assert all(1 <= shares[name] <= sizes[name] for name in sizes)


@pytest.mark.parametrize("total", [2, 15])
def test_impossible_number_of_clusters_is_refused(total: int) -> None:
    with pytest.raises(ValueError, match=f"3 <= num_clusters <= 14, got {total}"):
        share_out({"a": 1, "b": 4, "c": 9}, total)


def test_largest_remainder_and_ties_by_name() -> None:
    assert share_out({"b": 2, "a": 2, "c": 2}, 4) == {"b": 1, "a": 2, "c": 1}
    assert share_out({"gpt2": 6, "llama": 2}, 4) == {"gpt2": 3, "llama": 1}


def test_no_cell_is_empty_among_equal_points() -> None:
    points = unit(torch.ones(6, 4, dtype=torch.float64))
    cells, centres, objective = spherical_kmeans(points, 4, 3, torch.Generator().manual_seed(1))
    assert sorted(set(cells.tolist())) == [0, 1, 2, 3]
    assert objective == pytest.approx(6.0)
    assert torch.allclose(centres.norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_lone_device_keeps_its_raw_embedding() -> None:
    upload = toy_devices()[0]
    (only,) = cluster([upload], state_of, ClusterConfig(num_clusters=1), SEED)
    assert torch.allclose(only.centre, upload.embedding, atol=1e-6)


def test_one_device_cannot_send_twice() -> None:
    upload = toy_devices()[0]
    with pytest.raises(ValueError, match="every device may send one update"):
        cluster([upload, upload], state_of, ClusterConfig(num_clusters=1), SEED)


def test_affinity_finds_the_own_cluster_of_every_device() -> None:
    uploads = toy_devices()
    found = cluster(uploads, state_of, ClusterConfig(num_clusters=6), SEED)
    embeddings = torch.stack([u.embedding for u in uploads])
    cosines = affinity(embeddings, found)
    assert cosines.shape == (12, 6)
    assert cosines.max() <= 1 + 1e-6
    for row, upload in enumerate(uploads):
        mine = next(c.index for c in found if upload.device in c.members)
        assert cosines[row, mine] > 0.9
    assert not affinity(torch.zeros(1, 16), found).any()
    with pytest.raises(ValueError, match=r"\[rows, 16\], got \[2, 8\]"):
        affinity(torch.zeros(2, 8), found)


def test_sampling_weights_are_half_uniform_half_near() -> None:
    weights = sampling_weights(torch.tensor([1.0, 0.0, 0.0, -1.0]))
    assert weights.sum() == pytest.approx(1.0)
    assert weights[0] > 0.62
    assert weights.min() >= 0.125
    assert torch.allclose(sampling_weights(torch.full((5,), 0.3)), torch.full((5,), 0.2))


def test_balanced_weights_draw_every_domain_alike() -> None:
    domain = torch.tensor([0, 0, 0, 2, 2, 1])
    weights = balanced_weights(domain)
    sums = torch.zeros(3).index_add(0, domain, weights)
    assert torch.allclose(sums, torch.full((3,), 1 / 3))


def test_teacher_needs_affinity_above_the_threshold() -> None:
    cosines = torch.tensor([[0.2, 0.5], [0.3, 0.1], [0.31, 0.0]])
    assert best_teacher(cosines, 0.3).tolist() == [1, -1, 0]


def test_most_own_text_is_never_empty() -> None:
    # cluster 2 is nobody's nearest
    cosines = torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.9, 0.1], [0.5, 0.6, 0.55]])
    picks = most_own(cosines, 2)
    assert [pick.tolist() for pick in picks] == [[0], [1, 2], [2]]
    assert [pick.tolist() for pick in most_own(torch.zeros(3, 1), 2)] == [[0, 1]]
