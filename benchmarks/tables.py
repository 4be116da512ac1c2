"""`python benchmarks/tables.py`: benchmarks/results/ to the tables and plots of docs/benchmarks.md.

`--short` prints one line a case of this machine instead: ours beside the best peer.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

Rows = list[dict[str, Any]]
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
MARK = "<!-- made by benchmarks/tables.py; do not edit below -->"
# the automatic choice is the first of these that was measured
OURS = ("ours", "cpu", "triton", "cuda")
OWN = (*OURS, "reference")


def cases(rows: Rows) -> list[Rows]:
    """Rows of one door, shape and dtype together, in their order of appearance."""
    found: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("op", "case", "dtype"))
        found.setdefault(key, []).append(row)
    return list(found.values())


def chosen(case: Rows) -> dict[str, Any] | None:
    """The row of our automatic choice, if it was measured."""
    by_name = {row["variant"]: row for row in case}
    return next((by_name[name] for name in OURS if name in by_name), None)


def label(row: dict[str, Any]) -> str:
    shape = row.get("case", "distillation step")
    return f"`{row['op']}` {shape}" if "op" in row else shape


def table(rows: Rows) -> list[str]:
    """Rows as Markdown; "times ours" above 1: we win."""
    lines = [
        "| case | dtype | variant | median ms | p20-p80 | times ours | extra MiB | share of roof "
        "| error |",
        "|---|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for case in cases(rows):
        ours = chosen(case)
        for row in case:
            times = f"{row['median_ms'] / ours['median_ms']:.2f}" if ours else ""
            share = f"{row['share_of_roof']:.0%}" if "share_of_roof" in row else ""
            error = "" if row.get("error") is None else f"{row['error']:.1e}"
            lines.append(
                f"| {label(row)} | {row.get('dtype', 'float32')} | {row['variant']} "
                f"| {row['median_ms']:.2f} | {row['p20_ms']:.2f}-{row['p80_ms']:.2f} | {times} "
                f"| {row['extra_mib']:.1f} | {share} | {error} |"
            )
    return lines


def plot(rows: Rows, path: Path) -> None:
    """Time of every variant over ours, a group of bars a case; the same rows, the same bytes."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "deepfusion", "font.size": 8}
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["variant"] for row in rows))
    ticks, labels, height = [], [], 0.0
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.2 * len(rows) + 0.1 * len(cases(rows))))
    for case in cases(rows):
        # a case that none of ours serves is shown against its first variant
        unit = (chosen(case) or case[0])["median_ms"]
        ticks.append(height + (len(case) - 1) / 2)
        labels.append(f"{label(case[0]).replace('`', '')}\n{case[0].get('dtype', 'float32')}")
        for row in case:
            color = f"C{names.index(row['variant'])}"
            times = row["median_ms"] / unit
            axes.barh(height, times, color=color, height=0.9)
            axes.text(times, height, f" {row['median_ms']:.1f} ms", va="center", size=6)
            height += 1
        height += 0.7
    bars = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{number}") for number in range(len(names))]
    axes.legend(bars, names, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names))
    axes.set_yticks(ticks, labels)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.5)
    axes.margins(x=0.1)
    axes.set_xlabel("forward and backward, median time over ours")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


def earlier(found: dict[str, Any]) -> str:
    """Cases that a later, partial run left as they were, with the commit they were measured at."""
    old = {
        f"{row['case']} at {row['commit']}": None
        for row in found["rows"]
        if row.get("commit", found["commit"]) != found["commit"]
    }
    return f"; kept from earlier runs: {', '.join(old)}" if old else ""


def section(path: Path, page: Path) -> list[str]:
    """One results file as a section of the page, with its plot beside the page."""
    found = json.loads(path.read_text())
    picture = Path("benchmarks") / path.parent.name / f"{path.stem}.svg"
    plot(found["rows"], page.parent / picture)
    refused = [f"- no {key}: {reason}" for key, reason in found.get("refused", {}).items()]
    return [
        f"### {path.stem}",
        "",
        f"torch {found['torch']}, Python {found['python']}, {found['threads']} threads, "
        f"commit {found['commit']}{earlier(found)}.",
        "",
        *table(found["rows"]),
        "",
        *([*refused, ""] if refused else []),
        f"![{path.stem}]({picture})",
        "",
    ]


def write_page(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Replace what stands below the mark of the page."""
    lines: list[str] = []
    for device in sorted(path for path in results.iterdir() if path.is_dir()):
        lines += [f"## {device.name}", ""]
        for path in sorted(device.glob("*.json")):
            lines += section(path, page)
    head = page.read_text().split(MARK)[0]
    page.write_text(f"{head}{MARK}\n\n" + "\n".join(lines).rstrip() + "\n")


def short(folder: Path) -> list[str]:
    """One line a case: our time, the best peer's over ours, memory, share of roof."""
    lines = [
        f"{'case':56} {'dtype':9} {'ours ms':>9} {'best peer':>22} {'extra MiB':>10} {'roof':>5}"
    ]
    for path in sorted(folder.glob("*.json")):
        for case in cases(json.loads(path.read_text())["rows"]):
            ours = chosen(case)
            if ours is None:
                lines.append(f"{label(case[0]).replace('`', ''):56} not measured")
                continue
            peers = [row for row in case if row["variant"] not in OWN]
            best = min(peers, key=lambda row: row["median_ms"], default=None)
            times = best["median_ms"] / ours["median_ms"] if best else 0.0
            peer = f"{times:.2f}x {best['variant']}" if best else "-"
            share = f"{ours['share_of_roof']:.0%}" if "share_of_roof" in ours else "-"
            lines.append(
                f"{label(ours).replace('`', ''):56} {ours.get('dtype', 'float32'):9} "
                f"{ours['median_ms']:9.3f} {peer:>22} {ours['extra_mib']:10.1f} {share:>5}"
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="this machine's figures, to screen")
    if not parser.parse_args().short:
        write_page()
        return 0
    import torch

    from deepfusion_kernels.bench.roofline import device_name

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = RESULTS / device_name(device)
    if not folder.is_dir():
        print(f"tables: no results of this machine: {folder} does not exist", file=sys.stderr)
        return 1
    print("\n".join(short(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
