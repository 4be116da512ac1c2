"""The controls that the mixture must beat, and every model of the run on the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from .checkpoints import load_state, save_state
from .data.canaries import COPIES, make_canaries
from .data.prepared import Text
from .ledger import Ledger, baselines
from .library import Library
from .messages import DeviceUpdate, device_name
from .models import build
from .server.cluster import Cluster
from .server.controls import centralised_control, dense_control, server_steps
from .server.exposure import exposure
from .server.scoreboard import Entry, score_models
from .stages import Run
from .wire.expected import Expected
from .wire.package import read_state

BYTES_PER_VALUE = 2  # the baselines send bfloat16
ROW_OF = {
    "base": "base, which never saw them",
    "device": "upload of the device that holds one",
    "proxy": "proxy of its cluster",
    "moe": "mixture of experts",
}
KEPT_LOGITS = 128  # of FedMKT's baseline, unless the run itself keeps some


def assess(
    here: Run,
    text: Text,
    library: Library,
    expected: Expected,
    updates: Sequence[DeviceUpdate],
    clusters: Sequence[Cluster],
    nearness_SK: Tensor,
) -> None:
    """Train the controls, score everything, compare the bytes: evaluation.json and ledger.json."""
    last = "direct" if here.config.run.recipe == "direct" else "tune"
    made = _controls(here, text, library, clusters, nearness_SK)

    def work() -> None:
        entries = _entries(here, library, expected, updates, clusters, made)
        scores = score_models(
            entries, text.evaluation, text.facts, text.tokenizer, here.config.evaluate
        )
        scores["split"] = here.config.evaluate.split
        scores["not_checked"] = _not_checked(here, text)
        here.write("evaluation.json", scores)
        if here.config.evaluate.canaries:
            here.write("canaries.json", _exposures(here, text, entries, clusters))
        _compare_bytes(here, text, library, len(clusters))

    before = [last, "gate", "cluster", *made]
    here.stage("evaluate", before, ["evaluation.json"], work, reads=["evaluate", "controls"])


def _controls(
    here: Run,
    text: Text,
    library: Library,
    clusters: Sequence[Cluster],
    nearness_SK: Tensor,
) -> list[str]:
    """Stages of the controls that are switched on, at the recipe's total of server steps."""
    config = here.config
    steps = server_steps(config, len(clusters))
    made = []

    def dense() -> None:
        model = dense_control(
            library.saved("base"),
            [library.teacher(one, text.sequences) for one in clusters],
            text.sequences,
            nearness_SK,
            config.distill,
            config.tune,
            replace(config.tune, steps=steps),
            config.run.seed,
            recorder=here.recorder,
            checkpoint=here.checkpoint("control-dense", config.tune.checkpoint_steps),
            kernels=config.run.kernels,
        )
        save_state(here.folder / "controls" / "dense.safetensors", build.state_of(model))

    def centralised() -> None:
        model = centralised_control(
            library.upcycled(len(clusters), text.sequences, nearness_SK),
            text.pooled(config.data.context_length, config.run.seed),
            config.tune,
            config.merge,
            config.run.seed,
            steps=config.controls.centralised_steps
            or steps + config.federation.num_devices * config.devices.steps,
            recorder=here.recorder,
            checkpoint=here.checkpoint("control-centralised", config.tune.checkpoint_steps),
            kernels=config.run.kernels,
        )
        save_state(here.folder / "controls" / "centralised.safetensors", build.state_of(model))

    for name, wanted, work in (
        ("dense", config.controls.dense, dense),
        ("centralised", config.controls.centralised, centralised),
    ):
        if wanted:
            here.stage(
                f"control-{name}",
                ["base", "cluster"],
                [f"controls/{name}.safetensors"],
                work,
                reads=["run", "distill", "merge", "tune", "devices"],
            )
            made.append(f"control-{name}")
    return made


def _entries(
    here: Run,
    library: Library,
    expected: Expected,
    updates: Sequence[DeviceUpdate],
    clusters: Sequence[Cluster],
    made: Sequence[str],
) -> list[Entry]:
    """All models of the run, in the report's order."""

    def device(update: DeviceUpdate) -> Any:
        base = expected.architectures[update.architecture].base
        state = read_state(update.folder, update.manifest, base)
        return library.of_state(update.architecture, state)

    def control(name: str) -> Any:
        state, _ = load_state(here.folder / "controls" / f"{name}.safetensors")
        if name == "dense":
            return library.dense(state)
        model = library.saved(library.MOE)
        build.load_state(model, state)
        return model

    entries = [Entry("base", "base", lambda: library.saved("base"))]
    has_models = here.config.upload.kind != "logprobs"
    if has_models and not here.config.devices.tokenizer:
        entries += [Entry(one.device, "device", partial(device, one)) for one in updates]
        entries += [
            Entry(
                f"proxy {one.index}",
                "proxy",
                partial(library.of_state, one.architecture, one.proxy),
                # the mean of one device is that device
                same_as=one.members[0] if len(one.members) == 1 else "",
            )
            for one in clusters
        ]
    if here.config.run.recipe != "direct":
        entries += [
            Entry(f"M {one.index}", "student", partial(_student, here, library, one.index))
            for one in clusters
        ]
        entries.append(Entry("mean model", "mean", partial(library.mean_student, len(clusters))))
        entries.append(Entry("merged, not tuned", "merged", lambda: library.saved("merged")))
    if "control-dense" in made:
        entries.append(Entry("dense control", "control", partial(control, "dense")))
    if "control-centralised" in made:
        entries.append(Entry("centralised twin", "control", partial(control, "centralised")))
    entries.append(Entry("moe", "moe", lambda: library.saved(library.MOE)))
    return entries


def _exposures(
    here: Run, text: Text, entries: Sequence[Entry], clusters: Sequence[Cluster]
) -> dict[str, Any]:
    """Exposure of every planted secret in base, upload, proxy and mixture: what canaries.json has.

    An upload and a proxy are asked for the secrets of their own devices alone.
    """
    config = here.config
    planted = make_canaries(
        config.run.seed, config.evaluate.canaries, config.federation.num_devices
    )
    members = {f"proxy {one.index}": one.members for one in clusters}
    rows: dict[str, list[float]] = {}
    for entry in entries:
        if entry.kind not in ROW_OF:
            continue
        holders = {"device": (entry.name,), "proxy": members.get(entry.name, ())}.get(entry.kind)
        own = [one for one in planted if holders is None or device_name(one.device) in holders]
        if not own:
            continue
        model = entry.load()
        rows.setdefault(ROW_OF[entry.kind], []).extend(
            exposure(model, text.tokenizer, one.text, one.others) for one in own
        )
    most = math.log2(1 + len(planted[0].others))
    return {"planted": len(planted), "copies": COPIES, "most": most, "exposure": rows}


def _student(here: Run, library: Library, index: int) -> Any:
    return library.dense(load_state(here.folder / library.student(index))[0])


def _compare_bytes(here: Run, text: Text, library: Library, num_clusters: int) -> None:
    config = here.config
    moe = library.saved(library.MOE)
    total = sum(parameter.numel() for parameter in moe.parameters())
    routed = sum(p.numel() for name, p in moe.named_parameters() if ".experts." in name)
    kept = routed * config.merge.top_k / num_clusters
    alike = len(set(config.devices.architectures)) == 1
    base = sum(parameter.numel() for parameter in library.saved("base").parameters())
    Ledger(here.folder / "ledger").compare(
        baselines(
            num_devices=config.federation.num_devices,
            rounds=config.federation.rounds,
            moe_bytes=BYTES_PER_VALUE * total,
            partial_share=(total - routed + kept) / total,
            public_tokens=text.sequences.ids.numel(),
            kept_logits=config.upload.top_k if config.upload.kind == "logprobs" else KEPT_LOGITS,
            dense_bytes=BYTES_PER_VALUE * base if alike else None,
        )
    )


def _not_checked(here: Run, text: Text) -> list[str]:
    """Sentences for the report's last section: true of this run, not of the project."""
    config = here.config
    said = ["One seed: differences of a few per cent may be chance."]
    if config.run.device == "cpu":
        said.append("No GPU took part.")
    if not config.controls.dense:
        said.append("The dense control was switched off.")
    if not config.controls.centralised:
        said.append("The centralised twin was switched off.")
    if not text.facts:
        said.append("Fact recall needs the made text, whose facts are known.")
    if config.devices.tokenizer:
        said.append(
            "Devices and proxies have a tokenizer of their own: perplexities do not compare across "
            "tokenizers, and theirs are left out."
        )
    if config.upload.kind == "logprobs":
        said.append("Devices sent log-probabilities and no models: none of theirs could be scored.")
    unchecked = here.read("uploads.json")["norms_unchecked"]
    if unchecked and config.upload.kind != "logprobs":
        said.append(
            f"Norms of {', '.join(unchecked)} had too few uploads for a median; only "
            "upload.max_update_norm could bound them."
        )
    said.append("Devices ran in this process: no network, no dropout, no hostile upload.")
    return said
