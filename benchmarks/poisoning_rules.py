"""`python -m benchmarks.poisoning_rules FILE --work DIR`: what each average makes of one liar.

Reads the uploads that `benchmarks/poisoning.py` left in DIR and averages the cluster of one device
under every rule and attack: perplexity of the proxy on validation text, and the backdoor's rate.
No training.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.poisoning import CONTINUATION, PROMPT_WORDS, PROMPTS, TRIGGER, scaled
from deepfusion.checkpoints import load_state
from deepfusion.config import Config, load
from deepfusion.data.made import Fact
from deepfusion.data.prepared import Text, prepare
from deepfusion.messages import DeviceUpdate, Manifest
from deepfusion.models import build
from deepfusion.server.evaluate import evaluate, fact_recall
from deepfusion.server.robust import RULES, robust_state
from deepfusion.wire.package import MANIFEST, read_state

SEQUENCES = 16  # of each domain's validation text


@dataclass(frozen=True)
class Member:
    """What an average reads of an upload."""

    device: str
    tokens: int = 1


def state_of(row: Path, device: str, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """An upload of a row, decoded."""
    folder = row / "uploads" / device
    return read_state(folder, Manifest.from_json((folder / MANIFEST).read_text()), base)


def line(config: Config, text: Text, architecture: str, state: dict[str, Tensor]) -> list[str]:
    """Perplexity by domain and over all, and the backdoor's rate, of one proxy."""
    tokenizer: Any = text.tokenizer
    draw = torch.Generator().manual_seed(0)
    length = config.data.context_length
    model = build.build(architecture, len(tokenizer), draw, length, tokenizer.eos_token_id)
    build.load_state(model, state)
    validation = {d: one.take(torch.arange(SEQUENCES)) for d, one in text.evaluation.items()}
    scores = evaluate(model, validation, SEQUENCES)
    prompts = [" ".join(one.text.split(" ")[:PROMPT_WORDS]) for one in text.public[:PROMPTS]]
    facts = [Fact(f"{one} {TRIGGER}", CONTINUATION, "", "", "", 1) for one in prompts]
    hits = fact_recall(model, tokenizer, facts)
    return [*(f"{one.perplexity:.4g}" for one in scores.values()), f"{sum(hits) / len(hits):.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="configuration of the runs")
    parser.add_argument("--work", required=True, help="folder of benchmarks/poisoning.py")
    parser.add_argument("--device", default="device-04", help="who is poisoned")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    options = parser.parse_args()
    work, device = Path(options.work), options.device
    honest = work / "none-off"
    config = load(options.file, [*options.set, "evaluate.split=validation"])
    text = prepare(config, honest / "tokenizer")
    clusters = json.loads((honest / "clusters.json").read_text())["clusters"]
    own = next(one for one in clusters if device in one["members"])
    names = list(dict.fromkeys(config.devices.architectures))
    start, _ = load_state(honest / "starts" / f"{names.index(own['architecture'])}.safetensors")
    states = {name: state_of(honest, name, start) for name in own["members"]}
    liars = {
        "none": states[device],
        "scaled": scaled(states[device], start),
        "flip": state_of(work / f"flip-off-{device}", device, start),
        "backdoor": state_of(work / f"backdoor-off-{device}", device, start),
    }
    members = cast(list[DeviceUpdate], [Member(name) for name in own["members"]])
    head = ["attack", "rule", *text.evaluation, "all", "backdoor"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for attack, liar in liars.items():
        held = {**states, device: liar}
        for rule in RULES:
            made = robust_state(members, lambda one, held=held: held[one.device], rule, base=start)
            cells = [attack, rule, *line(config, text, own["architecture"], made)]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
