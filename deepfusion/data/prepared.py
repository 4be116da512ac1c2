"""All text of a run, in the shapes the stages read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import files
from ..config import Config
from . import corpora
from .batches import Packed, pack
from .canaries import make_canaries, plant
from .documents import CorpusError, Document
from .made import Fact, held_by
from .partition import partition, split_public
from .reading import has_domain, read_folder


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
    public, shards = _shared_out(config, by_domain)
    private = [document for shard in shards for document in shard]
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
        shards=shards,
        sequences=sequences,
        evaluation=evaluation,
        facts=held_by(corpora.facts(config.data, seed), private),
        device_tokenizer=device_tokenizer,
        device_sequences=device_sequences,
    )


def _shared_out(
    config: Config, by_domain: Mapping[str, corpora.Corpus]
) -> tuple[list[Document], list[list[Document]]]:
    """(the server's documents, those of every device); none where devices have their own."""
    devices, seed = config.federation.num_devices, config.run.seed
    if config.data.private == "own":
        return [one for corpus in by_domain.values() for one in corpus.train], [[]] * devices
    public, private = split_public(by_domain, config.data, seed)
    shards = partition(private, devices, config.data, seed)
    return public, plant(shards, make_canaries(seed, config.evaluate.canaries, devices))


def documents_of(config: Config, device: int, own: str) -> list[Document]:
    """The text that device `device` trains on: its share of the run's, or what lies in `own`.

    own: a folder with <domain>/train.jsonl or <domain>.jsonl of some of data.domains; read where
    data.private = "own". Raises CorpusError.
    """
    if config.data.private == "shares":
        return _shared_out(config, corpora.load(config.data, config.run.seed))[1][device]
    if not own:
        raise CorpusError(
            "network.data must be the folder of this device's text with data.private = 'own', "
            "got ''"
        )
    data = replace(config.data, path=own)
    held = [one for one in data.domains if has_domain(data, one)]
    if not held:
        raise CorpusError(
            f"{own}: must hold <domain>/train.jsonl of at least one of {list(data.domains)}"
        )
    return [document for domain in held for document in read_folder(data, domain)["train"]]


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
