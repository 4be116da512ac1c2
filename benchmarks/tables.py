"""`python benchmarks/tables.py`: benchmarks/results/ to the tables of docs/benchmarks.md."""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
MARK = "<!-- made by benchmarks/tables.py; do not edit below -->"


def ratio(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """How many times longer than our automatic choice on the same case: below 1 we lose."""
    ours = [
        one
        for one in rows
        if one["variant"] in ("cpu", "triton", "ours")
        and all(one.get(key) == row.get(key) for key in ("op", "case", "dtype"))
    ]
    return f"{row['median_ms'] / ours[0]['median_ms']:.2f}" if ours else ""


def table(path: Path) -> list[str]:
    """One results file as Markdown."""
    found = json.loads(path.read_text())
    rows = found["rows"]
    lines = [
        f"### {path.stem}",
        "",
        f"torch {found['torch']}, Python {found['python']}, {found['threads']} threads, "
        f"commit {found['commit']}.",
        "",
        "| case | dtype | variant | median ms | p20-p80 | times ours | extra MiB | share of roof |",
        "|---|---|---|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        case = row.get("case", "distillation step")
        name = f"`{row['op']}` {case}" if "op" in row else case
        share = f"{row['share_of_roof']:.0%}" if "share_of_roof" in row else ""
        lines.append(
            f"| {name} | {row.get('dtype', 'float32')} | {row['variant']} | {row['median_ms']:.2f} "
            f"| {row['p20_ms']:.2f}-{row['p80_ms']:.2f} | {ratio(row, rows)} "
            f"| {row['extra_mib']:.1f} | {share} |"
        )
    return [*lines, ""]


def main() -> int:
    lines = []
    for device in sorted(path for path in (HERE / "results").iterdir() if path.is_dir()):
        lines += [f"## {device.name}", ""]
        for path in sorted(device.glob("*.json")):
            lines += table(path)
    head = PAGE.read_text().split(MARK)[0]
    PAGE.write_text(f"{head}{MARK}\n\n" + "\n".join(lines).rstrip() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
