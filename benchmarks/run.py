"""`python benchmarks/run.py --op STEM`: published figures, ours and peers in one process.

Writes benchmarks/results/<device>/<stem>.json and prints a table; a partial run (--case, --dtype,
other inputs) replaces its own rows in that file and leaves the rest.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import baselines, baselines_alignment, peers, peers_moe
from benchmarks.inputs import varied
from deepfusion_kernels import __version__
from deepfusion_kernels._triton import HAS_TRITON, triton
from deepfusion_kernels.bench import roofline
from deepfusion_kernels.bench.runner import Row, measure
from deepfusion_kernels.cases import Case
from deepfusion_kernels.catalog import CATALOG

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def door_of(name: str) -> str:
    """The door of a function `<peer>_<door>`: the longest one that its name ends with."""
    doors = [door for op in CATALOG.values() for door in op.doors if name.endswith(f"_{door}")]
    return max(doors, key=len, default="")


def baselines_of(door: str, compiled: bool) -> dict[str, Callable[..., Any]]:
    """The functions `<peer>_<door>` of baselines*.py and peers*.py; eager through torch.compile."""
    known = vars(baselines) | vars(baselines_alignment) | vars(peers) | vars(peers_moe)
    found = {
        name.removesuffix(f"_{door}"): function
        for name, function in known.items()
        if callable(function) and not name.startswith("_") and door_of(name) == door
    }
    if compiled and "eager" in found:
        found["torch.compile"] = torch.compile(found["eager"])
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: device, versions, commit, measured roofs."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    facts: dict[str, Any] = {
        "device": roofline.device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "deepfusion_kernels": __version__,
        "commit": commit.stdout.strip() or None,
    }
    for name, dtype in DTYPES.items():
        if name != "float16":
            roof = roofline.measure(device, dtype)
            facts[f"roof_{name}"] = {
                "gb_per_s": roof.bytes_per_second / 1e9,
                "gflop_per_s": roof.flops_per_second / 1e9,
            }
    return facts


HEADER = (
    "| op | case | dtype | variant | median ms | p20-p80 | extra MiB | share of roof | error |\n"
    "|---|---|---|---|---:|---|---:|---:|---:|"
)


def line(row: Row) -> str:
    """One row as Markdown."""
    error = "" if row.error is None else f"{row.error:.1e}"
    return (
        f"| {row.op} | {row.case} | {row.dtype} | {row.variant} | {row.median_ms:.2f} "
        f"| {row.p20_ms:.2f}-{row.p80_ms:.2f} | {row.extra_mib:.1f} | {row.share_of_roof:.0%} "
        f"| {error} |"
    )


def cases_of(stem: str, options: argparse.Namespace) -> list[Case]:
    """The cases of a stem that are worth timing, on the inputs that were asked for."""
    cases = [case for case in CATALOG[stem].cases if not case.quick and options.case in case.name]
    # a whole name means that case alone, though others begin with it
    cases = [case for case in cases if case.name == options.case] or cases
    inputs = options.std, options.teacher, options.masked
    return [varied(case, *inputs) for case in cases[: 1 if options.quick else None]]


def run_stem(
    stem: str, device: torch.device, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of a stem, and who did not serve which case and why."""
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    for case in cases_of(stem, options):
        for name in options.dtype:
            # the reference states the meaning; its speed is nobody's concern
            found = measure(
                stem,
                case,
                device,
                DTYPES[name],
                baselines_of(case.door, compiled=not options.no_compile),
                repeats=3 if options.quick else options.repeats,
                skip=() if options.reference else ("reference",),
            )
            rows += [{**row.as_dict(), "shapes": found.shapes} for row in found.rows]
            print("\n".join(map(line, found.rows)), flush=True)
            for variant, reason in found.refused.items():
                refused[f"{case.door} {case.name} {name} {variant}"] = reason
                print(f"{case.door} {case.name} {name}: no {variant}: {reason}", flush=True)
    return rows, refused


def write(path: Path, facts: dict[str, Any], rows: list[dict[str, Any]], whole: bool) -> None:
    """Write a results file; a partial run keeps the rows that it did not measure again."""
    key = ("op", "case", "dtype", "variant")
    measured = {tuple(row[part] for part in key) for row in rows}
    if path.exists() and not whole:
        old = json.loads(path.read_text())["rows"]
        rows = [row for row in old if tuple(row[part] for part in key) not in measured] + rows
    rows = [{"commit": facts["commit"], **row} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", action="append", choices=list(CATALOG), help="stem; default all")
    parser.add_argument("--case", default="", help="the case of this name, else all that hold it")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="first case, 3 repeats, not written")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--reference", action="store_true", help="time the reference too")
    parser.add_argument("--std", type=float, help="standard deviation of the student's logits")
    parser.add_argument("--teacher", choices=("near", "far"))
    parser.add_argument("--masked", type=float, help="share of tokens without a label")
    return parser.parse_args(words)


def main() -> int:
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = environment(device)
    inputs = (options.std, options.teacher, options.masked)
    whole = not options.case and inputs == (None, None, None) and len(options.dtype) > 1
    failed = False
    print(HEADER)
    for stem in options.op or list(CATALOG):
        try:
            rows, refused = run_stem(stem, device, options)
        except (RuntimeError, ValueError) as error:
            print(f"{stem}: FAILED: {error}", file=sys.stderr)
            failed = True
            continue
        own = [key for key in refused if key.split()[-1] in CATALOG[stem].impls]
        failed |= bool(own)
        if not options.quick:
            path = RESULTS / facts["device"] / f"{stem}.json"
            write(path, {**facts, "refused": refused}, rows, whole)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
