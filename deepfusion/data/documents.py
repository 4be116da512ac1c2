"""A document, a corpus of one domain, and splits that never cut through a source."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from ..seeding import seed_for

# text that is public whatever the configuration says
PUBLIC_PREFIX = "public:"


class CorpusError(ValueError):
    """A data file or data set that cannot be read; the message names it."""


@dataclass(frozen=True)
class Document:
    """One text; `source` is the unit that is never split, `topic` reads coarse/fine."""

    text: str
    source: str
    domain: str
    topic: str

    @property
    def label(self) -> str:
        """Domain and coarse topic: what a skewed partition skews."""
        return f"{self.domain}/{self.topic.split('/')[0]}"


@dataclass(frozen=True)
class Corpus:
    """The documents of one domain by split."""

    train: list[Document]
    validation: list[Document]
    test: list[Document]


def split_by_source(
    documents: Iterable[Document], share: float, seed: int, *names: str
) -> tuple[list[Document], list[Document]]:
    """(kept, taken): about `share` of the sources is taken, by a hash of their names."""
    salt = seed_for(seed, "split", *names)
    kept: list[Document] = []
    taken: list[Document] = []
    for document in documents:
        (taken if unit_hash(document.source, salt) < share else kept).append(document)
    return kept, taken


def unit_hash(name: str, salt: int) -> float:
    """A number in [0, 1) that depends on the name and the salt alone."""
    digest = hashlib.sha256(f"{salt}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
