"""Text from files and hub, tokenizers; a bad file gives one sentence with file and line."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deepfusion.config_tables import DataConfig
from deepfusion.data import corpora, reading
from deepfusion.data.documents import CorpusError

SECRET = "a private sentence"


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"text": f"{SECRET} {i}", "source": f"s{i // 2}", **more} for i in range(count)]


def write(path: Path, content: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet files need pyarrow")
        parquet.write_table(arrow.Table.from_pylist(list(content)), path)
    else:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in content]
        path.write_text("".join(line + "\n" for line in lines))
    return path


def config(path: Path, *domains: str, **more: Any) -> DataConfig:
    return DataConfig(source="files", path=str(path), domains=domains, **more)


@pytest.fixture(params=["datasets", "plain"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to read: the library, and what stands in where it is absent."""
    if request.param == "datasets":
        pytest.importorskip("datasets", reason="the library datasets is absent")
    else:
        found = reading.importlib.util.find_spec
        absent = lambda name: None if name == "datasets" else found(name)  # noqa: E731
        monkeypatch.setattr(reading.importlib.util, "find_spec", absent)
    return str(request.param)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_folder_of_three_splits(tmp_path: Path, suffix: str, reader: str) -> None:
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        write(tmp_path / "law" / f"{split}{suffix}", rows(count, topic="tax/vat"))
    corpus = corpora.load(config(tmp_path, "law"), 7)["law"]
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [6, 2, 3]
    first = corpus.train[0]
    assert (first.text, first.source, first.domain) == (f"{SECRET} 0", "s0", "law")
    assert first.label == "law/tax"


def test_train_alone_is_split_by_source_and_fields_are_optional(tmp_path: Path) -> None:
    write(tmp_path / "law.jsonl", rows(200))
    corpus = corpora.load(config(tmp_path, "law"), 7)["law"]
    parts = [{d.source for d in part} for part in (corpus.train, corpus.validation, corpus.test)]
    assert len(set().union(*parts)) == sum(map(len, parts)) == 100
    assert all(parts)
    write(tmp_path / "law.jsonl", [{"text": f"{SECRET} {i}"} for i in range(40)])
    corpus = corpora.load(config(tmp_path, "law"), 7)["law"]
    assert len({d.source for d in corpus.train}) == len(corpus.train)
    assert corpus.train[0].label == "law/law"


def test_columns_can_be_joined(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"ask": "why", "answer": "so"}])
    assert reading.read_file(path, "law", "train", "ask+answer")[0].text == "why\nso"


def test_max_train_documents_keeps_whole_sources(tmp_path: Path) -> None:
    write(tmp_path / "law.jsonl", rows(200))
    thin = corpora.load(config(tmp_path, "law", max_train_documents=20), 7)["law"].train
    assert len(thin) == 20
    assert len({d.source for d in thin}) == 10


BAD = {
    "not-json": ([*rows(2), "{broken", *rows(2)], "line 3 must be a JSON object"),
    "truncated": ([*rows(1), '{"text": "cut of'], "line 2 must be a JSON object"),
    "a-list": ([*rows(1), "[1, 2]"], "line 2 must be a JSON object, got list"),
    "no-text": ([*rows(1), {"words": SECRET}], "line 2: 'text' must be text, got NoneType"),
    "null": ([*rows(3), {"text": None}], "line 4: 'text' must be text, got NoneType"),
    "number": ([{"text": 5}], "line 1: 'text' must be text, got int"),
    "blank": ([*rows(1), {"text": "  "}], "line 2: 'text' must be text, got an empty one"),
    "empty": ([], "must hold at least one document, is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_its_line_and_without_its_text(
    case: str, tmp_path: Path, reader: str
) -> None:
    lines, message = BAD[case]
    path = write(tmp_path / "law" / "train.jsonl", lines)
    with pytest.raises(CorpusError) as caught:
        corpora.load(config(tmp_path, "law"), 7)
    assert str(caught.value) == f"{path}: {message}"
    assert SECRET not in str(caught.value)


def test_a_binary_file_and_a_broken_parquet_file_are_named(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "law" / "train.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00\x01" * 9)
    with pytest.raises(CorpusError, match="line 1 must be a JSON object"):
        corpora.load(config(tmp_path, "law"), 7)
    broken = path.rename(path.with_suffix(".parquet"))
    with pytest.raises(CorpusError, match=f"{broken}: cannot be read"):
        corpora.load(config(tmp_path, "law"), 7)


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"data\.path must be a folder, got '/nowhere'"):
        corpora.load(config(Path("/nowhere"), "law"), 7)
    write(tmp_path / "law.jsonl", rows(40))
    with pytest.raises(CorpusError, match=r"domain 'tax' must have tax/train.jsonl or .parquet"):
        corpora.load(config(tmp_path, "law", "tax"), 7)
    with pytest.raises(CorpusError, match=r"data.domains must be of .* got 'law'"):
        corpora.load(DataConfig(domains=("law",)), 7)
    write(tmp_path / "law.jsonl", rows(2))
    with pytest.raises(CorpusError, match="domain 'law': too few sources"):
        corpora.load(config(tmp_path, "law"), 7)


def test_hub_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is absent")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    asked = DataConfig(source="hub", path="nobody/no-such-set", domains=("law",))
    with pytest.raises(CorpusError, match=r"'nobody/no-such-set' cannot be loaded .*network"):
        corpora.load(asked, 7)
    with pytest.raises(CorpusError, match=r"must name 2 hub data sets.* got 1"):
        corpora.load(DataConfig(source="hub", path="a/b", domains=("law", "tax")), 7)


def test_hub_sets_are_read_by_split_and_part(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    class Library:
        @staticmethod
        def load_dataset(name: str, part: str | None) -> dict[str, list[dict[str, str]]]:
            asked.append((name, part))
            return {"train": [{"ask": f"{i}", "answer": "so"} for i in range(60)]}

    monkeypatch.setitem(sys.modules, "datasets", Library)
    wanted = DataConfig(
        source="hub", path="a/b:english, c/d", domains=("law", "tax"), text_column="ask+answer"
    )
    found = corpora.load(wanted, 7)
    assert asked == [("a/b", "english"), ("c/d", None)]
    assert (
        sum(len(p) for p in (found["tax"].train, found["tax"].validation, found["tax"].test)) == 60
    )
    assert found["law"].train[0].text.endswith("\nso")


def test_tokenizer_is_repeatable_and_survives_saving(tmp_path: Path) -> None:
    texts = [f"the clinic of town {i} treats patients" for i in range(200)]
    first, second = (corpora.train_tokenizer(texts, 300) for _ in range(2))
    assert corpora.fingerprint(first) == corpora.fingerprint(second)
    assert corpora.fingerprint(corpora.train_tokenizer(texts[:50], 300)) != corpora.fingerprint(
        first
    )
    first.save_pretrained(str(tmp_path))
    loaded = corpora.load_tokenizer(tmp_path)
    assert corpora.fingerprint(loaded) == corpora.fingerprint(first)
    assert len(first) <= 300
    assert first.eos_token_id == 0
    odd = "naïve €5 — 日本\n"
    assert first.decode(first(odd)["input_ids"]) == odd


def test_tokenizer_refusals(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"data.tokenizer must be a folder"):
        corpora.load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match=r"vocab_size must be >= 257"):
        corpora.train_tokenizer(["text"], 200)


@pytest.mark.real_text
def test_real_text_loads() -> None:
    folder = next(
        (p / "shared/data" for p in Path(__file__).parents if (p / "shared/data").is_dir()), None
    )
    if folder is None:
        pytest.skip("the real text collection is absent: shared/data")
    loaded = corpora.load(config(folder, "medical", "finance", max_train_documents=500), 7)
    for corpus in loaded.values():
        assert 400 <= len(corpus.train) <= 500
        assert min(len(corpus.validation), len(corpus.test)) > 300
        assert all("/" in document.topic for document in corpus.test)
