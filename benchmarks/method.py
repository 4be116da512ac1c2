"""`python benchmarks/method.py --data DIR`: recipes and controls over seeds, at equal server steps.

Runs of one seed share their base, common starts and uploads, so that they differ by the server's
method alone. Prints the table of docs/log.md: mean and standard deviation over seeds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
# the first one of a seed is run alone and lends the rest its devices; it also trains the controls
CONFIGS = ("direct", "recommended", "paper", "kl_only", "ce_only")
SHARED = ("base", "starts", "uploads", "devices", "tokenizer", "expected")
OF_THE_FIRST = ("base", "dense control", "centralised twin")


def run(name: str, seed: int, folder: Path, options: argparse.Namespace) -> None:
    """One run of an example file, resumed if it was begun."""
    if (folder / "report.html").exists():
        return
    first = name == CONFIGS[0]
    sets = [
        "data.source=files",
        f"data.path={options.data}",
        f"run.seed={seed}",
        f"run.output={folder}",
        "run.threads=1",
        f"evaluate.split={options.split}",
        f"evaluate.max_tokens={options.max_tokens}",
        f"controls.dense={str(first).lower()}",
        f"controls.centralised={str(first and not options.no_centralised).lower()}",
        f"controls.centralised_steps={options.server_steps}",
        *steps_of(name, options.server_steps, options.clusters),
        *options.set,
    ]
    arguments = [part for one in sets for part in ("--set", one)]
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "deepfusion.cli", "run", f"examples/{name}.toml", *arguments],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def steps_of(name: str, total: int, num_clusters: int) -> list[str]:
    """Settings that give a recipe `total` optimiser steps on the server, whatever its stages."""
    clusters = f"cluster.num_clusters={num_clusters}"
    if name == "direct":
        return [clusters, f"tune.steps={total}"]
    each, left = divmod(total, num_clusters + 1)
    return [clusters, f"distill.steps={each}", f"tune.steps={each + left}"]


def lend(source: Path, target: Path) -> None:
    """Copy what all runs of a seed share; their stages see unchanged inputs and are skipped."""
    if target.exists():
        return
    target.mkdir(parents=True)
    for name in SHARED:
        shutil.copytree(source / name, target / name)
    (target / "stages").mkdir()
    for path in (source / "stages").glob("*.json"):
        if path.stem == "base" or path.stem.startswith(("start-", "device-")):
            shutil.copy(path, target / "stages")
    shutil.copy(source / "metrics.jsonl", target)


def one_seed(seed: int, options: argparse.Namespace) -> None:
    """Every configuration of a seed."""
    folder = Path(options.out) / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in CONFIGS if name in options.only or name == CONFIGS[0]]
    for name in wanted:
        if name != wanted[0]:
            lend(folder / wanted[0], folder / name)
        run(name, seed, folder / name, options)


def table(options: argparse.Namespace) -> str:
    """Perplexity by domain and the mean negative log likelihood, mean (deviation) over seeds."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        for name in CONFIGS:
            path = Path(options.out) / f"seed-{seed}" / name / "evaluation.json"
            if not path.exists():
                continue
            models = json.loads(path.read_text())["models"]
            rows = {f"MoE, {name}": models["moe"]}
            if "mean model" in models:
                rows[f"mean model, {name}"] = models["mean model"]
            if name == CONFIGS[0]:
                rows |= {one: models[one] for one in OF_THE_FIRST if one in models}
            for row, model in rows.items():
                scores = {d: s["perplexity"] for d, s in model["domains"].items()}
                nlls = [s["nll"] for d, s in model["domains"].items() if d != "general"]
                scores["nll of private domains"] = statistics.mean(nlls)
                found.setdefault(row, []).append(scores)
    columns = list(next(iter(found.values()))[0])
    lines = [
        "| model | " + " | ".join(columns) + " | seeds |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for row, seeds in found.items():
        cells = []
        for column in columns:
            values = [scores[column] for scores in seeds]
            deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
            digits = 3 if column.startswith("nll") else 1
            cells.append(f"{statistics.mean(values):.{digits}f} ({deviation:.{digits}f})")
        lines.append(f"| {row} | " + " | ".join(cells) + f" | {len(seeds)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with <domain>/{train,...}.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--only", nargs="+", default=list(CONFIGS), choices=CONFIGS)
    parser.add_argument("--out", default="runs/method")
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument("--max-tokens", type=int, default=0)
    parser.add_argument("--no-centralised", action="store_true")
    parser.add_argument("--server-steps", type=int, default=300, help="of all stages together")
    parser.add_argument("--clusters", type=int, default=4)
    parser.add_argument("--parallel", type=int, default=2, help="seeds at a time, one thread each")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.parallel) as pool:
        for _ in pool.map(lambda seed: one_seed(seed, options), options.seeds):
            pass
    print(table(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
