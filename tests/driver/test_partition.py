"""Who holds which text: sources stay whole, nobody is empty, the skew is as asked for."""

from collections import Counter
from dataclasses import replace

import pytest

from deepfusion.config_tables import DataConfig
from deepfusion.data.documents import Corpus, CorpusError, Document
from deepfusion.data.partition import partition, split_public

CONFIG = DataConfig(dirichlet=0.3, public_share=0.2)


def documents(domain: str, sources: int, each: int = 3, topics: int = 4) -> list[Document]:
    return [
        Document(f"text {s} {i}", f"{domain}/{s}", domain, f"topic{s % topics}/fine{i}")
        for s in range(sources)
        for i in range(each)
    ]


CORPORA = {
    domain: Corpus(documents(domain, 200), [], []) for domain in ("medical", "finance", "general")
}


def test_public_share_is_kept_and_sources_stay_whole() -> None:
    public, private = split_public(CORPORA, CONFIG, 7)
    assert len(public) + len(private) == 1800
    assert not {d.source for d in public} & {d.source for d in private}
    for domain in CORPORA:
        share = sum(d.domain == domain for d in public) / 600
        assert 0.12 < share < 0.28
    assert split_public(CORPORA, CONFIG, 7) == (public, private)
    assert split_public(CORPORA, CONFIG, 8)[0] != public


def test_general_public_text_is_no_devices() -> None:
    public, private = split_public(CORPORA, replace(CONFIG, public="general"), 7)
    assert {d.domain for d in public} == {"general"}
    assert {d.domain for d in private} == {"medical", "finance"}


def test_sources_marked_public_are_public_in_either_case() -> None:
    marked = [Document("open", "public:x", "medical", "t")]
    corpora = {**CORPORA, "medical": Corpus(documents("medical", 5) + marked, [], [])}
    for public in ("in-domain", "general"):
        assert marked[0] in split_public(corpora, replace(CONFIG, public=public), 7)[0]


def test_no_public_text_is_refused() -> None:
    with pytest.raises(CorpusError, match="public text must hold at least one document, got none"):
        split_public(CORPORA, replace(CONFIG, public="general", general_domain="law"), 7)


@pytest.mark.parametrize("kind", ["skewed", "random"])
@pytest.mark.parametrize("num_devices", [1, 8, 40])
def test_sources_never_cross_devices_and_nobody_is_empty(kind: str, num_devices: int) -> None:
    private = documents("medical", 60) + documents("finance", 20)
    shards = partition(private, num_devices, replace(CONFIG, partition=kind), 7)
    assert len(shards) == num_devices
    assert all(shards)
    owners: dict[str, set[int]] = {}
    for device, shard in enumerate(shards):
        for document in shard:
            owners.setdefault(document.source, set()).add(device)
    assert len(owners) == 80
    assert all(len(devices) == 1 for devices in owners.values())
    assert Counter(d for shard in shards for d in shard) == Counter(private)


def test_same_seed_same_shards() -> None:
    private = documents("medical", 60)
    assert partition(private, 8, CONFIG, 7) == partition(private, 8, CONFIG, 7)
    assert partition(private, 8, CONFIG, 7) != partition(private, 8, CONFIG, 8)


def test_a_devices_documents_do_not_depend_on_their_order() -> None:
    private = documents("medical", 60)
    swapped = partition(private[::-1], 8, CONFIG, 7)
    assert [set(shard) for shard in swapped] == [
        set(shard) for shard in partition(private, 8, CONFIG, 7)
    ]


def purity(shards: list[list[Document]]) -> float:
    """Mean share of a device's most frequent label."""
    shares = [max(Counter(d.label for d in shard).values()) / len(shard) for shard in shards]
    return sum(shares) / len(shares)


def test_small_dirichlet_is_more_skewed_than_random() -> None:
    private = documents("medical", 400) + documents("finance", 400)
    skewed = partition(private, 8, replace(CONFIG, dirichlet=0.1), 7)
    even = partition(private, 8, replace(CONFIG, dirichlet=100.0), 7)
    random = partition(private, 8, replace(CONFIG, partition="random"), 7)
    assert purity(skewed) > 0.4
    assert purity(even) < 0.25
    assert purity(random) < 0.25


def test_an_extreme_skew_still_deals_every_source() -> None:
    shards = partition(documents("medical", 30), 8, replace(CONFIG, dirichlet=1e-4), 7)
    assert sum(map(len, shards)) == 90
    assert all(shards)


def test_more_devices_than_sources_is_refused() -> None:
    with pytest.raises(CorpusError, match="sources must be at least 8, one for each device, got 3"):
        partition(documents("medical", 3), 8, CONFIG, 7)
