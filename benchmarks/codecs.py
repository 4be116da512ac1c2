"""`python -m benchmarks.codecs RUN ..`: bytes and loss of quality of every codec on finished runs.

The devices of each run are trained again from its common starts, because a run keeps no float32
state of them; each is packed by every codec (with --rank as adapters), read back, and averaged by
the run's clusters. Prints, over all runs: bytes a parameter, error as a share of the update,
validation perplexity of the proxies, largest change of a proxy's mean NLL against float32.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deepfusion import config as configuration
from deepfusion import metrics
from deepfusion.checkpoints import find_ties, load_state
from deepfusion.config import Config
from deepfusion.data.batches import Packed
from deepfusion.data.encoding import make_encoder
from deepfusion.data.prepared import Text, prepare
from deepfusion.device.train import train_device
from deepfusion.messages import Content, TrainedDevice
from deepfusion.metrics import Recorder
from deepfusion.models import build
from deepfusion.server.evaluate import evaluate
from deepfusion.wire import adapters
from deepfusion.wire.codecs import CODECS
from deepfusion.wire.package import read_state, write_package

State = Mapping[str, Tensor]


def trained(config: Config, text: Text, index: int, start: State) -> TrainedDevice:
    """One device of a run, as its own settings train it."""
    rank = config.devices.adapter_rank
    names = config.devices.architectures
    return train_device(
        names[index % len(names)],
        start,
        text.shards[index],
        text.device_tokenizer,
        config,
        f"device-{index:02d}",
        make_encoder(replace(config.embedding, idf="none"), None),
        Recorder(None),
        content=Content("adapter", rank) if rank else Content(),
    )


def model_of(one: TrainedDevice, start: State) -> dict[str, Tensor]:
    """What the device has, in float32, before any codec."""
    if one.content.kind == "adapter":
        return adapters.merged(start, one.state)
    return {name: tensor.clone() for name, tensor in one.state.items()}


def share_of_update(found: State, wanted: State, start: State) -> float:
    """|decoded - trained| / |trained - start| over all tensors."""
    lost = sum(float((found[n].double() - wanted[n].double()).square().sum()) for n in wanted)
    moved = sum(float((wanted[n].double() - start[n].double()).square().sum()) for n in wanted)
    return math.sqrt(lost / moved)


def proxy_nll(
    states: list[State], name: str, config: Config, text: Text, held: Mapping[str, Packed]
) -> float:
    """Mean negative log likelihood of the mean of some models."""
    tokenizer = text.device_tokenizer
    model = build.build(
        name,
        len(tokenizer),
        torch.Generator().manual_seed(0),
        config.data.context_length,
        tokenizer.eos_token_id,
    )
    mean = {key: torch.stack([one[key].double() for one in states]).mean(0) for key in states[0]}
    build.load_state(model, {key: tensor.float() for key, tensor in mean.items()})
    return evaluate(model, held, config.evaluate.batch_size)["all"].nll


def one_run(run: Path, rank: int, max_tokens: int) -> dict[str, list[dict[str, float]]]:
    """Codec -> one row a cluster."""
    sets = ["evaluate.split='validation'", f"devices.adapter_rank={rank}"]
    config = configuration.load(run / "config.toml", sets)
    text = prepare(config, run / "tokenizer")
    length = config.data.context_length
    kept = torch.arange(max(1, max_tokens // length))
    held = {d: one.take(kept[: len(one)]) for d, one in text.evaluation.items()}
    rows: dict[str, list[dict[str, float]]] = {}
    for cluster in json.loads((run / "clusters.json").read_text())["clusters"]:
        name = cluster["architecture"]
        turn = list(dict.fromkeys(config.devices.architectures)).index(name)
        start, _ = load_state(run / "starts" / f"{turn}.safetensors")
        count = sum(start[key].numel() for key in start.keys() - find_ties(start).keys())
        devices = [trained(config, text, int(d[-2:]), start) for d in cluster["members"]]
        exact = [model_of(one, start) for one in devices]
        plain = proxy_nll([*exact], name, config, text, held)
        rows.setdefault("float32", []).append({"nll": plain, "bytes": 4.0, "error": 0.0, "lost": 0})
        for codec in CODECS:
            read, sizes = [], 0
            for one in devices:
                with tempfile.TemporaryDirectory() as place:
                    folder = Path(place) / "up"
                    manifest = write_package(one, folder, codec)
                    sizes += sum(path.stat().st_size for path in folder.iterdir())
                    read.append(read_state(folder, manifest, start))
            nll = proxy_nll([*read], name, config, text, held)
            errors = [share_of_update(a, b, start) for a, b in zip(read, exact, strict=True)]
            rows.setdefault(codec, []).append(
                {
                    "nll": nll,
                    "bytes": sizes / (count * len(devices)),
                    "error": statistics.mean(errors),
                    "lost": nll - plain,
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--rank", type=int, default=0, help="of adapters; 0: whole models")
    parser.add_argument("--max-tokens", type=int, default=3000, help="of each domain")
    options = parser.parse_args()
    metrics.silence(True)
    found = [one_run(run, options.rank, options.max_tokens) for run in options.runs]
    print("| codec | bytes a parameter | error | perplexity of the proxies | largest change |")
    print("|---|---|---|---|---|")
    for codec in found[0]:
        rows = [row for one in found for row in one[codec]]
        by_run = [statistics.mean(math.exp(row["nll"]) for row in one[codec]) for one in found]
        deviation = statistics.stdev(by_run) if len(by_run) > 1 else float("nan")
        print(
            f"| {codec} | {statistics.mean(row['bytes'] for row in rows):.3f} "
            f"| {statistics.mean(row['error'] for row in rows):.2%} "
            f"| {statistics.mean(by_run):.2f} ({deviation:.2f}) "
            f"| {max(abs(row['lost']) for row in rows):.1e} nats |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
