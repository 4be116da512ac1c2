"""Results files to tables and plots, and a partial run into an existing file."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run, tables

FACTS = {"torch": "2.13", "python": "3.11", "threads": 2, "commit": "abc"}


def row(variant: str, median_ms: float, **changed: Any) -> dict[str, Any]:
    return {
        "op": "moe_experts",
        "case": "T8",
        "dtype": "bfloat16",
        "variant": variant,
        "median_ms": median_ms,
        "p20_ms": median_ms,
        "p80_ms": median_ms,
        "extra_mib": 1.5,
        "share_of_roof": 0.25,
        "error": 1e-3,
        **changed,
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = [row("triton", 2.0), row("cuda", 3.0), row("eager", 5.0), row("eager", 7.0, case="T9")]
    path = tmp_path / "results" / "some-gpu" / "moe_experts.json"
    run.write(path, {**FACTS, "refused": {"moe_experts T8 liger": "absent"}}, rows, whole=True)
    return path.parent.parent


def test_page_has_tables_plots_and_who_did_not_serve(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    page.write_text(f"by hand\n{tables.MARK}\nold")
    tables.write_page(page, results)
    text = page.read_text()
    assert text.startswith(f"by hand\n{tables.MARK}\n\n## some-gpu")
    assert "old" not in text
    wanted = (
        "| `moe_experts` T8 | bfloat16 | eager | 5.00 | 5.00-5.00 | 2.50 | 1.5 | 25% | 1.0e-03 |"
    )
    assert wanted in text
    assert "- no moe_experts T8 liger: absent" in text
    picture = page.parent / "benchmarks/some-gpu/moe_experts.svg"
    assert "(benchmarks/some-gpu/moe_experts.svg)" in text
    drawn = picture.read_bytes()
    assert b"triton" in drawn
    tables.write_page(page, results)
    assert (picture.read_bytes(), page.read_text()) == (drawn, text)


def test_short_names_the_best_peer_and_what_is_missing(results: Path) -> None:
    _, first, second = tables.short(results / "some-gpu")
    assert "2.000" in first
    assert "2.50x eager" in first
    assert "not measured" in second


def test_a_partial_run_keeps_the_other_rows(results: Path) -> None:
    path = results / "some-gpu" / "moe_experts.json"
    run.write(path, {**FACTS, "commit": "def"}, [row("triton", 1.0)], whole=False)
    rows = json.loads(path.read_text())["rows"]
    assert [(one["variant"], one["median_ms"]) for one in rows] == [
        ("cuda", 3.0),
        ("eager", 5.0),
        ("eager", 7.0),
        ("triton", 1.0),
    ]
    assert [one["commit"] for one in rows] == ["abc"] * 3 + ["def"]
    run.write(path, FACTS, [row("triton", 1.0)], whole=True)
    assert len(json.loads(path.read_text())["rows"]) == 1
