"""All text of a run, in the shapes the stages read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..config import Config
from . import corpora
from .batches import Packed, pack
from .documents import Document
from .made import Fact, held_by
from .partition import partition, split_public


@dataclass(frozen=True)
class Text:
    """public: the server's documents, packed in `sequences`; shards: those of every device.

    evaluation: the chosen split of every domain, packed; facts: those that devices' text states.
    """

    tokenizer: Any
    public: list[Document]
    shards: list[list[Document]]
    sequences: Packed
    evaluation: dict[str, Packed]
    facts: list[Fact]

    def label(self, device: int) -> str:
        """The domain/coarse topic most of a device's documents have; the server never sees it."""
        return Counter(one.label for one in self.shards[device]).most_common(1)[0][0]

    def pooled(self, context_length: int, seed: int) -> Packed:
        """Everybody's text together, for the centralised control alone."""
        private = [document for shard in self.shards for document in shard]
        return pack([*self.public, *private], self.tokenizer, context_length, seed)


def prepare(config: Config, tokenizer_folder: Path) -> Text:
    """Read or make the text, share it out, tokenize it; a missing tokenizer is trained first.

    Raises CorpusError naming file and line, domain or key.
    """
    seed, length = config.run.seed, config.data.context_length
    by_domain = corpora.load(config.data, seed)
    public, private = split_public(by_domain, config.data, seed)
    tokenizer = _tokenizer(config, public, tokenizer_folder)
    evaluation = {
        domain: pack(getattr(corpus, config.evaluate.split), tokenizer, length, seed)
        for domain, corpus in by_domain.items()
    }
    return Text(
        tokenizer=tokenizer,
        public=public,
        shards=partition(private, config.federation.num_devices, config.data, seed),
        sequences=pack(public, tokenizer, length, seed),
        evaluation=evaluation,
        facts=held_by(corpora.facts(config.data, seed), private),
    )


def _tokenizer(config: Config, public: Sequence[Document], folder: Path) -> Any:
    if not folder.is_dir():
        made = (
            corpora.load_tokenizer(config.data.tokenizer)
            if config.data.tokenizer
            else corpora.train_tokenizer((one.text for one in public), config.data.vocab_size)
        )
        with files.whole(folder) as partial:
            made.save_pretrained(str(partial))
    # read back, so that a resumed run has the very same object
    return corpora.load_tokenizer(folder)
