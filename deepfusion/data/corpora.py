"""Text by domain, from files, from the hub or made here; and the tokenizer all models share.

Documents of one `source` are one unit: where a split is missing, whole sources are taken from train
by a hash of their names.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config_tables import DataConfig
from ..seeding import seed_for
from .documents import Corpus as Corpus
from .documents import CorpusError as CorpusError
from .documents import Document as Document
from .documents import split_by_source, unit_hash
from .made import Fact, make_world
from .reading import read_folder, read_hub

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.1


def load(config: DataConfig, seed: int) -> dict[str, Corpus]:
    """The corpora of a run by domain, in the order of the configuration.

    Raises CorpusError naming file and line, domain, or data set.
    """
    if config.source == "made":
        world = make_world(seed, config.made_entities)
        unknown = sorted(set(config.domains) - set(world.corpora))
        if unknown:
            raise CorpusError(
                f"data.domains must be of {sorted(world.corpora)} where data.source = 'made', "
                f"got {unknown[0]!r}"
            )
        corpora = {domain: world.corpora[domain] for domain in config.domains}
    else:
        read = read_folder if config.source == "files" else read_hub
        corpora = {
            domain: _complete(read(config, domain), domain, seed) for domain in config.domains
        }
    limit = config.max_train_documents
    if limit:
        corpora = {
            name: Corpus(_thin(one.train, limit, seed), one.validation, one.test)
            for name, one in corpora.items()
        }
    return corpora


def facts(config: DataConfig, seed: int) -> list[Fact]:
    """The facts of the run's world; none where the text is real."""
    if config.source != "made":
        return []
    world = make_world(seed, config.made_entities)
    return [fact for fact in world.facts if fact.domain in config.domains]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer: same texts, same merges; `<|endoftext|>` has id 0.

    Little text gives fewer than `vocab_size` entries: models are built with len(tokenizer).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise ValueError(
            f"train_tokenizer: vocab_size must be >= 257 (all bytes), got {vocab_size}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def load_tokenizer(path: str | Path) -> Any:
    """A fast tokenizer from a local folder; it must know an end-of-text token."""
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise CorpusError(f"data.tokenizer must be a folder with tokenizer.json, got {str(path)!r}")
    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise CorpusError(f"{path}: must hold a fast tokenizer with an end-of-text token")
    return tokenizer


def fingerprint(tokenizer: Any) -> str:
    """32 hex digits of what decides text -> ids: vocabulary, merges, normaliser, pre-tokenizer."""
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {key: facts.get(key) for key in ("added_tokens", "model", "normalizer")}
    deciding["pre_tokenizer"] = facts.get("pre_tokenizer")
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:32]


def _complete(splits: dict[str, list[Document]], domain: str, seed: int) -> Corpus:
    """Takes the splits that are missing from train, whole sources at a time."""
    train = splits["train"]
    for split in ("validation", "test"):
        if split not in splits:
            train, splits[split] = split_by_source(train, HELD_OUT_SHARE, seed, domain, split)
    if not train or not splits["validation"] or not splits["test"]:
        raise CorpusError(
            f"domain {domain!r}: too few sources to split into train, validation and test; "
            "give the splits as files"
        )
    return Corpus(train, splits["validation"], splits["test"])


def _thin(documents: list[Document], limit: int, seed: int) -> list[Document]:
    """At most `limit` documents, whole sources by hash, in their order."""
    salt = seed_for(seed, "thin")
    order = sorted({document.source for document in documents}, key=lambda s: unit_hash(s, salt))
    counts: dict[str, int] = {}
    for document in documents:
        counts[document.source] = counts.get(document.source, 0) + 1
    chosen: set[str] = set()
    total = 0
    for source in order:
        if total + counts[source] <= limit or not chosen:
            chosen.add(source)
            total += counts[source]
    return [document for document in documents if document.source in chosen]
