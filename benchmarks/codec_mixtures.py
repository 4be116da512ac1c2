"""`python -m benchmarks.codec_mixtures RUN .. --work DIR`: the mixture of each kind of upload.

The devices of every finished run are trained once more, their float32 states kept; packed by every
codec, read back, averaged by the run's clusters, and the averages teach the mixture by recipe
"direct". Rows already in DIR are not repeated.

    float32      never packed: the control
    adapter      low-rank updates, by the default codec
    logprobs     the likeliest tokens of some public sequences; no features
    plain        float32 teachers on the sequences and without the features of logprobs: its control
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.codecs import State, model_of, trained
from deepfusion import config as configuration
from deepfusion import files, metrics
from deepfusion.asked import content_of, taught
from deepfusion.checkpoints import load_state, save_state
from deepfusion.config import Config
from deepfusion.data.batches import Packed
from deepfusion.data.prepared import Text, prepare
from deepfusion.device.answer import Answers
from deepfusion.messages import Content, DeviceUpdate, Manifest, TrainedDevice
from deepfusion.metrics import Recorder
from deepfusion.models import build
from deepfusion.server.direct import direct
from deepfusion.server.evaluate import evaluate
from deepfusion.server.fit import fit
from deepfusion.server.kept import KeptText, mean_kept
from deepfusion.server.merge import merge
from deepfusion.server.proxy import mean_state
from deepfusion.server.router_init import RouterText
from deepfusion.server.teaching import Teacher
from deepfusion.server.tune import drawn
from deepfusion.wire.contents import sent
from deepfusion.wire.package import Sent, read_state, state_revision, write_package

WEIGHTS = ("float32", "delta-int8", "xor", "bf16", "plain")
KINDS = (*WEIGHTS, "adapter", "logprobs")
Row = dict[str, Any]
ASKED = ("upload.kind=logprobs", "distill.feature_loss=none")


@dataclass(frozen=True)
class Finished:
    """A finished run as one kind of upload needs it; `place` keeps devices and packages."""

    run: Path
    place: Path
    kind: str
    config: Config
    text: Text

    @classmethod
    def of(cls, run: Path, work: Path, kind: str, sets: Sequence[str]) -> "Finished":
        place = work / f"{run.parent.name}-{run.name}"
        own = [] if kind == "adapter" else ["devices.adapter_rank=0"]
        own += ASKED if kind in ("logprobs", "plain") else []
        config = configuration.load(run / "config.toml", ["evaluate.split=validation", *sets, *own])
        return cls(run, place, kind, config, prepare(config, run / "tokenizer"))

    def start(self, index: int) -> tuple[str, dict[str, Tensor]]:
        """Architecture and common start of a device."""
        names = self.config.devices.architectures
        name = names[index % len(names)]
        turn = list(dict.fromkeys(names)).index(name)
        return name, load_state(self.run / "starts" / f"{turn}.safetensors")[0]

    def model(self, name: str, state: State) -> torch.nn.Module:
        """An architecture, or the base's folder, with a state."""
        tokenizer = self.text.device_tokenizer
        draw = torch.Generator().manual_seed(0)
        length = self.config.data.context_length
        made: torch.nn.Module = build.build(
            name, len(tokenizer), draw, length, tokenizer.eos_token_id
        )
        if state:
            build.load_state(made, state)
        return made

    def device(self, index: int) -> TrainedDevice:
        """A device as its training left it, trained if it was not yet."""
        name, start = self.start(index)
        rank = self.config.devices.adapter_rank
        path = self.place / f"devices-{rank}" / f"device-{index:02d}.safetensors"
        if not path.exists():
            one = trained(self.config, self.text, index, start)
            save_state(path, one.state, {"tokens": one.tokens})
        state, facts = load_state(path)
        content = Content("adapter", rank) if rank else Content()
        if self.kind == "logprobs":
            content, model = content_of(self.config, self.text), self.model(name, state)
            ids = taught(self.config, self.text).sequences.ids
            state = cast(dict[str, Tensor], Answers(model, ids, content, 16))
        return TrainedDevice(
            device=f"device-{index:02d}",
            architecture=name,
            state=state,
            base=sent(content, start),
            base_revision=state_revision(start),
            embedding=torch.ones(4),
            tokens=facts["tokens"],
            tokenizer_fingerprint="",
            seed=0,
            content=content,
        )

    def upload(self, index: int) -> DeviceUpdate:
        """The device's package, and what the server reads of it."""
        one, codec = self.device(index), self.config.upload.codec
        folder = self.place / f"packed-{self.kind}" / one.device
        if folder.exists():
            manifest = Manifest.from_json((folder / "manifest.json").read_text())
        else:
            manifest = write_package(one, folder, self.kind if self.kind in WEIGHTS else codec)
        return DeviceUpdate(folder, manifest, one.embedding / 2)

    def teachers(self) -> tuple[list[Teacher], list[str], int]:
        """The mean of every cluster, its revision, and the bytes of all packages."""
        clusters = json.loads((self.run / "clusters.json").read_text())["clusters"]
        means: list[Mapping[str, Tensor]] = []
        teachers: list[Teacher] = []
        total = 0
        for group in clusters:
            indices = [int(member[-2:]) for member in group["members"]]
            name, start = self.start(indices[0])
            if self.kind in ("float32", "plain"):
                exact = [model_of(self.device(index), start) for index in indices]
                mean = {n: torch.stack([s[n].double() for s in exact]).mean(0) for n in exact[0]}
                means.append({n: tensor.float() for n, tensor in mean.items()})
            else:
                updates = [self.upload(index) for index in indices]
                means.append(self._mean(updates))
                packed = [path for one in updates for path in one.folder.iterdir()]
                total += sum(path.stat().st_size for path in packed)
            if self.kind == "logprobs":
                teachers.append(KeptText(means[-1], self.sequences.ids))
            else:
                teachers.append(self.model(name, means[-1]))
        return teachers, [state_revision(one) for one in means], total

    def _mean(self, updates: Sequence[DeviceUpdate]) -> dict[str, Tensor]:
        asks = self.kind == "logprobs"
        reader: Callable[..., Mapping[str, Tensor]] = Sent if asks else read_state

        def load(one: DeviceUpdate) -> Mapping[str, Tensor]:
            return reader(one.folder, one.manifest, self.start(int(one.device[-2:]))[1])

        return (mean_kept if asks else mean_state)(updates, load, self.config.cluster.weights)

    @property
    def sequences(self) -> Packed:
        """The public text that teachers are asked about."""
        return taught(self.config, self.text).sequences

    def mixture(self, teachers: Sequence[Teacher]) -> dict[str, float]:
        """Mean negative log likelihood of the mixture that they teach, by domain."""
        config, sequences = self.config, self.sequences
        rows = drawn(sequences, config.tune, config.run.seed)
        near = fit(teachers, sequences, config.evaluate.batch_size, rows)
        base = self.model(str(self.run / "base"), {})
        moe = merge(
            [build.state_of(base)] * len(teachers),
            base.config,
            config.merge,
            config.run.seed,
            RouterText(sequences.ids, near),
        )
        tables = (config.distill, config.tune, config.merge, config.run.seed)
        direct(moe, teachers, sequences, near, *tables, recorder=Recorder(None))
        kept = torch.arange(max(1, config.evaluate.max_tokens // config.data.context_length))
        held = {d: one.take(kept[: len(one)]) for d, one in self.text.evaluation.items()}
        return {d: one.nll for d, one in evaluate(moe, held, config.evaluate.batch_size).items()}


def one_row(finished: Finished) -> Row:
    """What one kind of upload of one run led to; equal averages are not taught twice."""
    teachers, revisions, total = finished.teachers()
    for path in sorted(finished.place.glob("*.json")):
        before = json.loads(path.read_text())
        # the same bits taught by the same configuration: xor and bf16 read back alike
        if before["revisions"] == revisions and finished.kind in WEIGHTS[:4]:
            return {**before, "bytes": total, "same_as": path.stem}
    return {"nll": finished.mixture(teachers), "revisions": revisions, "bytes": total}


def table(rows: Mapping[str, Mapping[str, Row]]) -> str:
    """Markdown of kind -> run -> row: means (standard deviations) over the runs.

    The change against the control is of the runs that both have, each against its own.
    """
    lines = ["| upload | runs | perplexity of the mixture | against its control | MB a run |"]
    lines.append("|---|---|---|---|---|")
    for kind, own in rows.items():
        control = rows.get("plain" if kind == "logprobs" else "float32", {})
        found = {run: math.exp(one["nll"]["all"]) for run, one in own.items()}
        both = sorted(own.keys() & control.keys())
        changes = [found[run] / math.exp(control[run]["nll"]["all"]) - 1 for run in both]
        size = statistics.mean(one["bytes"] for one in own.values()) / 1e6
        cells = [kind, str(len(own)), _spread([*found.values()], ".2f")]
        cells += [_spread(changes, "+.2%") if both else "-", f"{size:.1f}" if size else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{format(statistics.mean(values), form)} ({format(spread, form.lstrip('+'))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--work", required=True, type=Path, help="devices, packages and rows")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--rank", type=int, default=8, help="of adapters")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    options = parser.parse_args()
    metrics.silence(True)
    for kind in options.kinds:
        for run in options.runs:
            sets = [*options.set, f"devices.adapter_rank={options.rank}"]
            finished = Finished.of(run, options.work, kind, sets)
            path = finished.place / f"{kind}.json"
            if not path.exists():
                torch.set_num_threads(finished.config.run.threads or torch.get_num_threads())
                files.write_json(path, one_row(finished))
        done = {
            name: {path.parent.name: json.loads(path.read_text()) for path in paths}
            for name in KINDS
            if (paths := sorted(options.work.glob(f"*/{name}.json")))
        }
        print(table(done), flush=True)


if __name__ == "__main__":
    main()
