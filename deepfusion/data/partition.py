"""Which text is the server's, and which device holds what of the rest.

A source is the unit: all its documents go one way.

    skewed    each label (domain/coarse topic) spreads over devices by Dirichlet(alpha) times the
              devices' log-normal sizes; small alpha: few devices hold a label
    random    sources go to devices by log-normal sizes alone
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..config_tables import DataConfig
from ..seeding import numpy_rng
from .documents import PUBLIC_PREFIX, Corpus, CorpusError, Document, split_by_source

# the largest of eight devices then holds about four times the smallest
_SIZE_SPREAD = 0.5


def split_public(
    corpora: Mapping[str, Corpus], config: DataConfig, seed: int
) -> tuple[list[Document], list[Document]]:
    """(public, private) train documents.

    "in-domain": a share of every domain's sources, by hash. "general": the general domain alone,
    which then is no device's. Sources that begin with `public:` are public in either case.
    """
    public: list[Document] = []
    private: list[Document] = []
    for domain, corpus in corpora.items():
        open_to_all = [one for one in corpus.train if one.source.startswith(PUBLIC_PREFIX)]
        rest = [one for one in corpus.train if not one.source.startswith(PUBLIC_PREFIX)]
        if config.public == "general":
            taken = rest if domain == config.general_domain else []
            rest = [] if domain == config.general_domain else rest
        else:
            rest, taken = split_by_source(rest, config.public_share, seed, domain, "public")
        public += open_to_all + taken
        private += rest
    if not public or not private:
        side = "public" if not public else "private"
        raise CorpusError(
            f"split_public: {side} text must hold at least one document, got none of "
            f"{sum(len(corpus.train) for corpus in corpora.values())}; see data.public_share"
        )
    return public, private


def partition(
    private: Sequence[Document], num_devices: int, config: DataConfig, seed: int
) -> list[list[Document]]:
    """The documents of every device, in the order given; no device is empty.

    Raises CorpusError where there are fewer sources than devices.
    """
    labels: dict[str, str] = {}
    for document in private:
        labels.setdefault(document.source, document.label)
    if len(labels) < num_devices:
        raise CorpusError(
            f"partition: sources must be at least {num_devices}, one for each device, "
            f"got {len(labels)}"
        )
    rng = numpy_rng(seed, "partition")
    sizes = rng.lognormal(0.0, _SIZE_SPREAD, num_devices)
    owner: dict[str, int] = {}
    for label in sorted(set(labels.values())) if config.partition == "skewed" else [""]:
        members = sorted(s for s, its in labels.items() if label in ("", its))
        share = sizes
        if label:
            share = sizes * rng.dirichlet([config.dirichlet] * num_devices)
        owner |= _deal(members, share, rng)
    _fill_empty(owner, num_devices)
    shards: list[list[Document]] = [[] for _ in range(num_devices)]
    for document in private:
        shards[owner[document.source]].append(document)
    return shards


def _deal(members: list[str], share: np.ndarray, rng: np.random.Generator) -> dict[str, int]:
    """Shuffles the sources and cuts them in proportion to the devices' shares."""
    order = rng.permutation(len(members))
    # an extreme Dirichlet draw may underflow to nothing for everybody
    share = share + np.finfo(float).tiny
    ends = np.round(np.cumsum(share) / share.sum() * len(members)).astype(int)
    devices = np.searchsorted(ends, np.arange(len(members)), side="right")
    return {members[place]: int(device) for place, device in zip(order, devices, strict=True)}


def _fill_empty(owner: dict[str, int], num_devices: int) -> None:
    """Gives every empty device a source of the device with most sources."""
    for device in range(num_devices):
        counts = np.bincount(list(owner.values()), minlength=num_devices)
        if counts[device] == 0:
            richest = int(counts.argmax())
            owner[min(source for source, one in owner.items() if one == richest)] = device
