"""`python benchmarks/run.py --op STEM`: published figures, ours and peers in one process.

Writes benchmarks/results/<device>/<stem>.json and prints a table.
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

from benchmarks import baselines
from deepfusion_kernels import __version__
from deepfusion_kernels._triton import HAS_TRITON, triton
from deepfusion_kernels.bench import roofline
from deepfusion_kernels.bench.runner import Row, measure
from deepfusion_kernels.catalog import CATALOG

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def baselines_of(door: str, compiled: bool) -> dict[str, Callable[..., Any]]:
    """The functions `<name>_<door>` of baselines.py; eager also through torch.compile."""
    ending = f"_{door}"
    found = {
        name.removesuffix(ending): function
        for name, function in vars(baselines).items()
        if name.endswith(ending) and callable(function)
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
    "| op | case | dtype | variant | median ms | p20-p80 | extra MiB | share of roof |\n"
    "|---|---|---|---|---:|---|---:|---:|"
)


def line(row: Row) -> str:
    """One row as Markdown."""
    return (
        f"| {row.op} | {row.case} | {row.dtype} | {row.variant} | {row.median_ms:.2f} "
        f"| {row.p20_ms:.2f}-{row.p80_ms:.2f} | {row.extra_mib:.1f} | {row.share_of_roof:.0%} |"
    )


def run_stem(stem: str, device: torch.device, options: argparse.Namespace) -> list[Row]:
    """Measure every case of a stem that is worth timing."""
    rows: list[Row] = []
    for case in CATALOG[stem].cases:
        if case.quick or (options.case and options.case not in case.name):
            continue
        for name in options.dtype:
            # the reference states the meaning; its speed is nobody's concern
            found = measure(
                stem,
                case,
                device,
                DTYPES[name],
                baselines_of(case.door, compiled=not options.no_compile),
                repeats=options.repeats,
                skip=() if options.reference else ("reference",),
            )
            rows += found
            print("\n".join(map(line, found)), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", action="append", choices=list(CATALOG), help="stem; default all")
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--reference", action="store_true", help="time the reference too")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = environment(device)
    failed = False
    print(HEADER)
    for stem in options.op or list(CATALOG):
        try:
            rows = run_stem(stem, device, options)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            print(f"{stem}: FAILED: {error}", file=sys.stderr)
            failed = True
            continue
        folder = RESULTS / facts["device"]
        folder.mkdir(parents=True, exist_ok=True)
        document = {**facts, "rows": [row.as_dict() for row in rows]}
        (folder / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
