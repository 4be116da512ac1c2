"""All text of a run, in the shapes the stages read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    device_tokenizer, device_sequences: the devices' own; where they have none, the server's.
    evaluation: the chosen split of every domain, packed; facts: those that devices' text states.
    """

    tokenizer: Any
    public: list[Document]
    shards: list[list[Document]]
    sequences: Packed
    evaluation: dict[str, Packed]
    facts: list[Fact]
    device_tokenizer: Any
    device_sequences: Packed

    def for_devices(self) -> Text:
        """The same text with the devices' tokenizer and the public sequences cut by it."""
        return replace(self, tokenizer=self.device_tokenizer, sequences=self.device_sequences)

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
    sequences = pack(public, tokenizer, length, seed)
    device_tokenizer, device_sequences = tokenizer, sequences
    if config.devices.tokenizer:
        device_tokenizer = corpora.load_tokenizer(config.devices.tokenizer)
        device_sequences = pack(public, device_tokenizer, length, seed)
    evaluation = {
        domain: pack(getattr(corpus, config.evaluate.split), tokenizer, length, seed)
        for domain, corpus in by_domain.items()
    }
    return Text(
        tokenizer=tokenizer,
        public=public,
        shards=partition(private, config.federation.num_devices, config.data, seed),
        sequences=sequences,
        evaluation=evaluation,
        facts=held_by(corpora.facts(config.data, seed), private),
        device_tokenizer=device_tokenizer,
        device_sequences=device_sequences,
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
