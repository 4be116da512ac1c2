"""Documents from files and from the hub.

    <folder>/<domain>/{train,validation,test}.jsonl | .parquet
    <folder>/<domain>.jsonl | .parquet                              train alone
    {"text": ..., "source": optional, "topic": optional "coarse/fine"}

Errors name the file and the line, never the text.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config_tables import DataConfig
from .documents import CorpusError, Document

SUFFIXES = (".jsonl", ".parquet")
_EMPTY = "{}: must hold at least one document, is empty"


def read_file(path: Path, domain: str, split: str, text_column: str = "text") -> list[Document]:
    """All documents of one JSON-lines or Parquet file."""
    columns = text_column.split("+")
    try:
        rows = list(_rows(path))
    except Exception as error:
        # whatever the reader stumbled over: the slow pass finds its line
        _find_bad_line(path, columns)
        raise CorpusError(f"{path}: cannot be read ({type(error).__name__})") from error
    if not rows:
        raise CorpusError(_EMPTY.format(path))
    documents = []
    for number, row in enumerate(rows, 1):
        texts = [row.get(column) for column in columns] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            _find_bad_line(path, columns)
            raise CorpusError(f"{path}: row {number}: {text_column!r} must be text, not empty")
        source = row.get("source") or f"{domain}/{split}/{number}"
        topic = row.get("topic") or domain
        documents.append(Document("\n".join(map(str, texts)), str(source), domain, str(topic)))
    return documents


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    parquet = path.suffix == ".parquet"
    if importlib.util.find_spec("datasets") is not None:
        from datasets import load_dataset

        # streaming: the text is not copied into a cache elsewhere on the disk
        kind = "parquet" if parquet else "json"
        yield from load_dataset(kind, data_files=str(path), split="train", streaming=True)
    elif parquet:
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    else:
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


def _find_bad_line(path: Path, columns: list[str]) -> None:
    """Raises for the first bad line of a JSON-lines file; a Parquet file has no lines to name."""
    if path.suffix == ".parquet":
        return
    with path.open("rb") as lines:
        filled = 0
        for number, line in enumerate(lines, 1):
            if line.strip():
                filled += 1
                _check_line(f"{path}: line {number}", line, columns)
    if not filled:
        raise CorpusError(_EMPTY.format(path))


def _check_line(where: str, line: bytes, columns: list[str]) -> None:
    try:
        row = json.loads(line)
    except ValueError:
        raise CorpusError(f"{where} must be a JSON object") from None
    if not isinstance(row, dict):
        raise CorpusError(f"{where} must be a JSON object, got {type(row).__name__}")
    for column in columns:
        text = row.get(column)
        if not isinstance(text, str) or not text.strip():
            got = "an empty one" if isinstance(text, str) else type(text).__name__
            raise CorpusError(f"{where}: {column!r} must be text, got {got}")


def _files_of(root: Path, domain: str) -> dict[str, Path]:
    files = {}
    for split in ("train", "validation", "test"):
        names = [root / domain / f"{split}{suffix}" for suffix in SUFFIXES]
        if split == "train":
            names += [root / f"{domain}{suffix}" for suffix in SUFFIXES]
        found = next((name for name in names if name.is_file()), None)
        if found is not None:
            files[split] = found
    return files


def has_domain(config: DataConfig, domain: str) -> bool:
    """Whether the folder holds training text of a domain."""
    return "train" in _files_of(Path(config.path), domain)


def read_folder(config: DataConfig, domain: str) -> dict[str, list[Document]]:
    root = Path(config.path)
    if not root.is_dir():
        raise CorpusError(f"data.path must be a folder, got {config.path!r}")
    files = _files_of(root, domain)
    if "train" not in files:
        raise CorpusError(
            f"{root}: domain {domain!r} must have {domain}/train.jsonl or .parquet, found none"
        )
    return {
        split: read_file(path, domain, split, config.text_column) for split, path in files.items()
    }


def read_hub(config: DataConfig, domain: str) -> dict[str, list[Document]]:
    """`data.path` names one data set for each domain, by commas; `name:part` for a part of one."""
    names = [name.strip() for name in config.path.split(",")]
    if len(names) != len(config.domains):
        raise CorpusError(
            f"data.path must name {len(config.domains)} hub data sets, one for each of "
            f"data.domains, got {len(names)}"
        )
    name, _, part = names[config.domains.index(domain)].partition(":")
    from datasets import load_dataset

    try:
        splits = load_dataset(name, part or None)
    except Exception as error:
        raise CorpusError(
            f"data.path: hub data set {name!r} cannot be loaded ({type(error).__name__}); "
            "it needs a network and an existing name; use data.source = 'files' without one"
        ) from error
    found = {}
    columns = config.text_column.split("+")
    for split, wanted in {"train": "train", "validation": "validation", "test": "test"}.items():
        if wanted in splits:
            found[split] = [
                _hub_document(row, columns, f"{name}:{split}", number, domain)
                for number, row in enumerate(splits[wanted], 1)
            ]
    if not found.get("train"):
        raise CorpusError(f"hub data set {name!r}: must have a split 'train' that is not empty")
    return found


def _hub_document(
    row: dict[str, Any], columns: list[str], where: str, number: int, domain: str
) -> Document:
    texts = [row.get(column) for column in columns]
    if not all(isinstance(text, str) for text in texts):
        raise CorpusError(f"{where}: row {number}: {'+'.join(columns)!r} must be texts")
    source = row.get("source") or f"{where}:{number}"
    return Document(
        "\n".join(map(str, texts)), str(source), domain, str(row.get("topic") or domain)
    )
