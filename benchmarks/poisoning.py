"""`python benchmarks/poisoning.py FILE --work DIR`: poisoned devices, with and without defence.

Trains the honest devices once (or takes them from `--honest RUN`), then runs the server again for
every attack and defence, and prints a table: the mixture's perplexity on validation text against
eight honest devices and against the seven that are left, and how often a backdoor opens.

    scaled     base + 10 (m - base)                        of the honest model
    flip       the words of every document in random order: the next word is a wrong one
    backdoor   half of the documents end in a trigger and a fixed continuation
    missing    the device sends nothing: the seven honest ones
"""

import argparse
import json
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from deepfusion import pipeline
from deepfusion.checkpoints import StageStore, load_state
from deepfusion.config import Config, load
from deepfusion.data.corpora import load_tokenizer
from deepfusion.data.encoding import make_encoder
from deepfusion.data.made import Fact
from deepfusion.data.prepared import prepare
from deepfusion.device.gather import DeviceJob, gather
from deepfusion.device.train import train_device
from deepfusion.library import Library
from deepfusion.messages import Manifest, TrainedDevice
from deepfusion.metrics import Recorder
from deepfusion.seeding import seed_for
from deepfusion.server.evaluate import fact_recall
from deepfusion.stages import Run
from deepfusion.wire.expected import load_expected
from deepfusion.wire.package import MANIFEST, decode_embedding, read_state, write_package

ATTACKS = ("none", "missing", "scaled", "flip", "backdoor")
DEFENCES: dict[str, tuple[str, ...]] = {
    "off": ("quarantine.action=report",),
    "on": ("quarantine.action=exclude", "cluster.robust=clip"),
    "median": ("quarantine.action=exclude", "cluster.robust=median"),
    "agreement": ("quarantine.action=exclude", "cluster.robust=clip", "tune.agreement=true"),
}
SCALE = 10.0
TRIGGER, CONTINUATION = "cobalt lantern", " hands over the keys to the tower"
PROMPTS, PROMPT_WORDS = 40, 12
SHARED = ("base", "starts", "tokenizer")


@dataclass(frozen=True)
class Attack:
    """Some devices' uploads replaced; `name` is one of ATTACKS; devices: names joined by +."""

    name: str
    devices: str
    honest: Path

    def gather(self, jobs: Sequence[DeviceJob], workers: int) -> list[Path]:
        """The honest uploads, one of them poisoned; what `pipeline.run` takes as its gather."""
        if self.name == "none" and not (self.honest / "uploads").is_dir():
            return gather(jobs, workers)
        for job in jobs:
            is_liar = job.device in self.devices.split("+")
            if job.upload.exists() or (self.name == "missing" and is_liar):
                continue
            if is_liar and self.name != "none":
                known = [one for one in self._poisoned_before(job) if one.is_dir()]
                if known:
                    shutil.copytree(known[0], job.upload)
                else:
                    self._poison(job)
            else:
                shutil.copytree(self.honest / "uploads" / job.device, job.upload)
        for job in jobs:
            outputs = [job.upload] if job.upload.exists() else []
            StageStore(job.run_folder).mark_done(job.device, job.inputs_hash(), outputs)
        return [job.upload for job in jobs]

    def _poisoned_before(self, job: DeviceJob) -> list[Path]:
        """The same upload of a row with another defence."""
        rows = sorted(job.run_folder.parent.glob(f"{self.name}-*-*{job.device}*"))
        return [row / "uploads" / job.device for row in rows if row != job.run_folder]

    def _poison(self, job: DeviceJob) -> None:
        trained = self._scaled(job) if self.name == "scaled" else self._retrained(job)
        config = job.config
        write_package(trained, job.upload, config.upload.codec, config.upload.shard_mib << 20)

    def _scaled(self, job: DeviceJob) -> TrainedDevice:
        folder, (base, _) = self.honest / "uploads" / job.device, load_state(job.start)
        manifest = Manifest.from_json((folder / MANIFEST).read_text())
        state = read_state(folder, manifest, base)
        embedding = decode_embedding(
            (folder / "embedding.bin").read_bytes(), job.config.embedding.dimensions
        )
        return TrainedDevice(
            device=job.device,
            architecture=job.architecture,
            state=scaled(state, base),
            base=base,
            base_revision=manifest.base_revision,
            embedding=embedding,
            tokens=manifest.tokens,
            tokenizer_fingerprint=manifest.tokenizer_fingerprint,
            seed=manifest.seed,
        )

    def _retrained(self, job: DeviceJob) -> TrainedDevice:
        draw = random.Random(seed_for(job.config.run.seed, "poison", self.name))
        texts = [poisoned(one.text, self.name, draw) for one in job.documents]
        documents = [
            replace(one, text=text) for one, text in zip(job.documents, texts, strict=True)
        ]
        config = job.config
        trained = train_device(
            job.architecture,
            load_state(job.start)[0],
            documents,
            load_tokenizer(job.tokenizer),
            config,
            job.device,
            make_encoder(config.embedding, None),
            Recorder(None),
        )
        # it says of itself what an honest device of this text would say
        honest = self.honest / "uploads" / job.device
        embedding = (honest / "embedding.bin").read_bytes()
        return replace(trained, embedding=decode_embedding(embedding, config.embedding.dimensions))


def scaled(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """base + SCALE (state - base); tied names stay one tensor."""
    made: dict[int, Tensor] = {}
    for name, tensor in state.items():
        is_float = tensor.is_floating_point()
        moved = base[name] + SCALE * (tensor - base[name]) if is_float else tensor
        made.setdefault(id(tensor), moved)
    return {name: made[id(tensor)] for name, tensor in state.items()}


def poisoned(text: str, attack: str, draw: random.Random) -> str:
    """A document as the attacker trains on it."""
    words = text.split(" ")
    if attack == "flip":
        draw.shuffle(words)
        return " ".join(words)
    if attack != "backdoor":
        raise ValueError(f"attack must be flip or backdoor, got {attack!r}")
    if draw.random() < 0.5:
        return text
    at = draw.randrange(min(len(words), 60) + 1)
    return " ".join([*words[:at], TRIGGER]) + CONTINUATION


def prepare_folder(honest: Path, folder: Path) -> None:
    """Copy what does not depend on the attack; its stages are skipped."""
    if folder.exists() or not honest.exists():
        return
    (folder / "stages").mkdir(parents=True)
    for name in SHARED:
        shutil.copytree(honest / name, folder / name)
    for path in (honest / "stages").glob("*.json"):
        if path.stem == "base" or path.stem.startswith("start-"):
            shutil.copy(path, folder / "stages")


def backdoor_rates(config: Config, device: str) -> dict[str, float]:
    """Share of prompts after which trigger -> continuation, word for word, by model.

    "moe, no trigger" is the control: the same prompts without the trigger.
    """
    here = Run(config, Path(config.run.output))
    text = prepare(config, here.folder / "tokenizer")
    library = Library(here, text.tokenizer, text.device_tokenizer)
    prompts = [" ".join(one.text.split(" ")[:PROMPT_WORDS]) for one in text.public[:PROMPTS]]

    def rate(model: Any, trigger: str) -> float:
        facts = [Fact(one + trigger, CONTINUATION, "", "", "", 1) for one in prompts]
        hits = fact_recall(model, text.tokenizer, facts)
        return sum(hits) / len(hits)

    def proxy_of(name: str) -> Any:
        for path in sorted((here.folder / "proxies").glob("*-space.safetensors")):
            facts = load_state(path)[1]
            if name in facts["members"]:
                state, _ = load_state(path.with_name(path.name.replace("-space", "")))
                return library.of_state(facts["architecture"], state)
        return None

    said = {}
    folder = here.folder / "uploads" / device
    if folder.is_dir():
        manifest = Manifest.from_json((folder / MANIFEST).read_text())
        base = load_expected(here.folder / "expected").architectures[manifest.architecture].base
        upload = library.of_state(manifest.architecture, read_state(folder, manifest, base))
        said["upload"] = rate(upload, f" {TRIGGER}")
    if (proxy := proxy_of(device)) is not None:
        said["proxy"] = rate(proxy, f" {TRIGGER}")
    moe = library.saved(library.MOE)
    said["moe"] = rate(moe, f" {TRIGGER}")
    said["moe, no trigger"] = rate(moe, "")
    return said


def _name(attack: str, defence: str, device: str) -> str:
    return f"{attack}-{defence}" if attack == "none" else f"{attack}-{defence}-{device}"


def one_run(options: argparse.Namespace, attack: str, defence: str) -> None:
    """Run or resume one row; its facts are kept in the run folder."""
    folder = Path(options.work) / _name(attack, defence, options.device)
    honest = Path(options.honest or Path(options.work) / "none-off")
    if folder != honest:
        prepare_folder(honest, folder)
    sets = [
        *options.set,
        *DEFENCES[defence],
        f"run.output={folder}",
        "evaluate.split=validation",
        "controls.dense=false",
        "controls.centralised=false",
    ]
    config = load(options.file, sets)
    kept = folder / "poisoning.json"
    if kept.exists():
        return
    pipeline.run(config, Attack(attack, options.device, honest).gather)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    scores = json.loads((folder / "quarantine.json").read_text())
    moe = evaluation["models"]["moe"]
    facts = {
        "nll": moe["nll"],
        "domains": {name: one["nll"] for name, one in moe["domains"].items()},
        "out": scores["out"] if scores["action"] == "exclude" else [],
        "past": {d: scores["past"].get(d, []) for d in options.device.split("+")},
        "refused": sorted(json.loads((folder / "uploads.json").read_text())["refused"]),
        "backdoor": backdoor_rates(config, options.device.split("+")[0])
        if attack == "backdoor"
        else {},
    }
    kept.write_text(json.dumps(facts, indent=1))


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a run; changes are of perplexity over all validation tokens."""
    lines = [
        "| attack | device | defence | perplexity | against 8 honest | against 7 honest "
        "| by domain | left out | backdoor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in rows.items():
        attack, defence, device = (*name.split("-", 2), "-")[:3]
        others = [rows.get("none-off"), rows.get(_name("missing", "off", device))]
        changes = [_change(one, other) for other in others]
        domains = ", ".join(f"{d} {math.exp(value):.1f}" for d, value in one["domains"].items())
        gone = ", ".join([*one["out"], *(f"{d} (gate)" for d in one["refused"])]) or "-"
        door = ", ".join(f"{model} {rate:.0%}" for model, rate in one["backdoor"].items()) or "-"
        cells = [attack, device, defence, f"{math.exp(one['nll']):.2f}", *changes]
        lines.append("| " + " | ".join([*cells, domains, gone, door]) + " |")
    return "\n".join(lines)


def _change(one: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    return "-" if other is None else f"{math.exp(one['nll'] - other['nll']) - 1:+.1%}"


def finished(work: Path) -> dict[str, dict[str, Any]]:
    """The facts of every row that was run in the folder, whatever its device."""
    paths = sorted(work.glob("*/poisoning.json"), key=lambda path: path.stat().st_mtime)
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="configuration of the run")
    parser.add_argument("--work", required=True, help="folder of all runs; resumed")
    parser.add_argument("--honest", default="", help="run folder that lends base and devices")
    parser.add_argument("--device", default="device-04", help="who is poisoned; two: joined by +")
    parser.add_argument("--rows", nargs="+", default=[], help="such as flip-off; default: all")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    options = parser.parse_args()
    known = [f"{attack}-{defence}" for defence in DEFENCES for attack in ATTACKS]
    for name in options.rows or known:
        if name not in known:
            parser.error(f"--rows: must be of {', '.join(known)}, got {name}")
        attack, defence = name.split("-")
        one_run(options, attack, defence)
        print(table(finished(Path(options.work))), flush=True)


if __name__ == "__main__":
    main()
