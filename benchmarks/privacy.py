"""`python -m benchmarks.privacy RUN`: what noise on a device costs, and what it hides.

Trains some devices of a finished run once more from its common starts, with secrets planted in
their text (data/canaries.py), under each noise of DP-SGD; 0 is plain training. Prints for each:
epsilon of the accountant, perplexity of the device's model on validation text, exposure of its own
secrets, and as the control exposure of the same secrets in the common start.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deepfusion import config as configuration
from deepfusion import metrics
from deepfusion.checkpoints import load_state
from deepfusion.config import Config
from deepfusion.data.canaries import Canary, make_canaries
from deepfusion.data.encoding import make_encoder
from deepfusion.data.prepared import Text, prepare
from deepfusion.device.train import train_device
from deepfusion.metrics import Recorder
from deepfusion.models import build
from deepfusion.server.evaluate import evaluate
from deepfusion.server.exposure import exposure


def model_of(config: Config, text: Text, index: int, state: Any) -> Any:
    """A device's architecture with a state."""
    names, tokenizer = config.devices.architectures, text.device_tokenizer
    draw, length = torch.Generator().manual_seed(0), config.data.context_length
    name = names[index % len(names)]
    model = build.build(name, len(tokenizer), draw, length, tokenizer.eos_token_id)
    build.load_state(model, state)
    return model


def told(
    config: Config, text: Text, model: Any, secrets: Sequence[Canary], max_tokens: int
) -> tuple[float, list[float]]:
    """Perplexity on validation text, and bits of exposure of each secret."""
    kept = torch.arange(max(1, max_tokens // config.data.context_length))
    held = {domain: one.take(kept[: len(one)]) for domain, one in text.evaluation.items()}
    found = evaluate(model, held, config.evaluate.batch_size)["all"].perplexity
    tokenizer = text.device_tokenizer
    return found, [exposure(model, tokenizer, one.text, one.others) for one in secrets]


def one_row(run: Path, index: int, noise: float, options: argparse.Namespace) -> list[str]:
    """One device under one noise, and its common start."""
    sets = [*options.set, f"devices.dp_noise={noise}", f"evaluate.canaries={options.canaries}"]
    config = configuration.load(run / "config.toml", ["evaluate.split=validation", *sets])
    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    text = prepare(config, run / "tokenizer")
    names = config.devices.architectures
    name = names[index % len(names)]
    turn = list(dict.fromkeys(names)).index(name)
    start, _ = load_state(run / "starts" / f"{turn}.safetensors")
    count = config.federation.num_devices
    planted = make_canaries(config.run.seed, options.canaries, count)
    secrets = [one for one in planted if one.device == index]
    before, least = told(
        config, text, model_of(config, text, index, start), secrets, options.max_tokens
    )
    trained = train_device(
        name,
        start,
        text.shards[index],
        text.device_tokenizer,
        config,
        f"device-{index:02d}",
        make_encoder(config.embedding, None),
        Recorder(None),
    )
    after, bits = told(
        config, text, model_of(config, text, index, trained.state), secrets, options.max_tokens
    )
    spent = trained.privacy
    said = f"{spent['epsilon']:.2f}" if spent else "none"
    exposed = [f"{statistics.mean(one):.2f} / {max(one):.2f}" for one in (bits, least)]
    cells = [f"device-{index:02d}", f"{trained.tokens:,}", f"{noise:g}", said]
    return [*cells, f"{after:.1f}", f"{before:.1f}", str(len(bits)), *exposed]


HEAD = (
    "device",
    "tokens",
    "noise",
    "epsilon",
    "perplexity",
    "of the start",
    "secrets",
    "exposure, mean / most",
    "in the start",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--devices", type=int, nargs="+", default=[0])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--canaries", type=int, default=64, help="of all devices together")
    parser.add_argument("--max-tokens", type=int, default=6000, help="of each domain")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    options = parser.parse_args()
    metrics.silence(True)
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for index in options.devices:
        for noise in options.noise:
            print(f"| {' | '.join(one_row(options.run, index, noise, options))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
