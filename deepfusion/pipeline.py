"""The stages in order: the only file that knows two of them.

    text -> base, starts -> gather -> gate -> quarantine -> cluster -> distill -> merge -> tune
         -> controls -> evaluate -> report

Recipe "direct" has no students: the base is upcycled and the proxies teach the mixture itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import report
from .asked import taught
from .assess import assess
from .checkpoints import load_state, save_model, save_state
from .config import Config
from .data.encoding import Encoder
from .data.prepared import Text, documents_of, prepare
from .device.gather import gather as in_process
from .library import Library
from .messages import DeviceUpdate, device_name
from .models import build
from .server.affinity import affinity
from .server.cluster import Cluster, cluster, clustering_facts
from .server.direct import direct
from .server.distill import distill
from .server.fit import fit
from .server.kept import mean_kept
from .server.merge import merge
from .server.robust import robust_average
from .server.router_init import RouterText
from .server.shard import ranks
from .server.tune import drawn, tune
from .stages import Run
from .starts import common_starts, train_base
from .trust import allowed, clusters_for, trusted
from .uploads import Gather, collect, good_updates, job_of
from .wire.expected import Expected
from .wire.package import Sent, read_state


def run(config: Config, gather: Gather = in_process) -> Path:
    """Run every stage that is not done yet in the folder `run.output`; return the report's path.

    Under torchrun the students are shared out among the processes, and the mixture is trained by
    all of them together. Raises what a stage raises, each with a sentence; finished stages stay
    finished.
    """
    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    here = Run(config, Path(config.run.output), ranks(config.run.device))
    text = prepare(config, here.folder / "tokenizer") if here.ranks.first else None
    here.ranks.wait()
    # the others read the tokenizer that the first has trained
    text = text or prepare(config, here.folder / "tokenizer")
    library = Library(here, text.tokenizer, text.device_tokenizer)
    train_base(here, text, library)
    encode, expected = common_starts(here, text.for_devices(), library)
    text = taught(config, text)
    collect(here, text, expected, gather)
    good = good_updates(here, expected)
    updates = trusted(here, text.device_sequences, library, expected, good)
    clusters = _clusters(here, text, expected, updates)
    found = _nearness(here, text, library, encode, clusters)
    nearness = allowed(here, found, text.sequences, clusters)
    if config.run.recipe == "direct":
        _direct(here, text, library, clusters, nearness)
    else:
        _distill(here, text, library, clusters, nearness)
        _merge_and_tune(here, text, library, clusters, nearness)
    if here.ranks.first:
        alone = Run(config, here.folder)
        assess(alone, text, library, expected, updates, clusters, nearness)
        report.write_report(here.folder)
    here.ranks.wait()
    return here.folder / report.PAGE


def one_device(config: Config, device: int) -> Path:
    """Train and package one device, send nothing; return the folder of its package.

    Raises what training raises; ValueError where the server's files are needed and are not there.
    """
    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    if config.data.private == "own":
        return _with_own_text(config, device)
    here = Run(config, Path(config.run.output))
    text = prepare(config, here.folder / "tokenizer")
    common_starts(here, text.for_devices(), Library(here, text.tokenizer, text.device_tokenizer))
    return in_process([job_of(here, device, text.shards[device])])[0]


def _with_own_text(config: Config, device: int) -> Path:
    """A device with text of its own cannot make the common start: it needs the server's files."""
    here = Run(config, Path(config.run.output))
    missing = [name for name in ("starts", "tokenizer") if not (here.folder / name).is_dir()]
    if missing:
        raise ValueError(
            f"{here.folder}: must hold the server's starts/ and tokenizer/ with data.private = "
            f"'own', lacks {missing[0]}/; copy them from the server's run folder"
        )
    documents = documents_of(config, device, config.network.data)
    return in_process([job_of(here, device, documents)])[0]


def _clusters(
    here: Run, text: Text, expected: Expected, updates: Sequence[DeviceUpdate]
) -> list[Cluster]:
    count = clusters_for(here.config.cluster, len(updates))
    config = replace(here.config.cluster, num_clusters=count)
    folder = here.folder / "proxies"
    holds_models = expected.content.kind != "logprobs"

    def read(update: DeviceUpdate) -> Mapping[str, Tensor]:
        base = expected.architectures[update.architecture].base
        reader = read_state if holds_models else Sent
        return reader(update.folder, update.manifest, base)

    def work() -> None:
        bases = {name: one.base for name, one in expected.architectures.items()}
        average = robust_average(config.robust, bases) if holds_models else mean_kept
        found = cluster(updates, read, config, here.config.run.seed, average)
        for one in found:
            save_state(folder / f"{one.index}.safetensors", one.proxy)
            space = {"centre": one.centre, "origin": one.origin}
            facts = {"architecture": one.architecture, "members": list(one.members)}
            save_state(folder / f"{one.index}-space.safetensors", space, facts)
        labels = None
        if here.config.data.private == "shares":
            labels = {device_name(index): text.label(index) for index in range(len(text.shards))}
        here.write("clusters.json", clustering_facts(found, updates, labels, config.robust))

    # who may go on is an input: all that passed the gate, unless the quarantine took some
    before = ["gate", *(["quarantine"] if here.config.quarantine.action == "exclude" else [])]
    here.stage("cluster", before, ["proxies", "clusters.json"], work, reads=["cluster"])
    return [_read_cluster(folder, index) for index in range(count)]


def _read_cluster(folder: Path, index: int) -> Cluster:
    space, facts = load_state(folder / f"{index}-space.safetensors")
    proxy, _ = load_state(folder / f"{index}.safetensors")
    return Cluster(index, facts["architecture"], tuple(facts["members"]), proxy=proxy, **space)


def _nearness(
    here: Run, text: Text, library: Library, encode: Encoder, clusters: Sequence[Cluster]
) -> Tensor:
    """How near every public sequence stands to every cluster: [S, K]."""
    if here.config.distill.nearness == "embedding":
        of_documents = affinity(encode([one.text for one in text.public]), clusters)
        return of_documents[text.sequences.document]
    path = here.folder / "fit.safetensors"

    def work() -> None:
        proxies = [library.teacher(one, text.sequences) for one in clusters]
        # without students nothing but the mixture's own stream is ever asked about
        direct_run = here.config.run.recipe == "direct"
        rows = drawn(text.sequences, here.config.tune, here.config.run.seed) if direct_run else None
        found = fit(proxies, text.sequences, here.config.evaluate.batch_size, rows)
        save_state(path, {"fit": found})

    here.stage("fit", ["cluster"], [path.name], work, reads=["data", "tune"])
    return load_state(path)[0]["fit"]


def _distill(
    here: Run, text: Text, library: Library, clusters: Sequence[Cluster], nearness_SK: Tensor
) -> None:
    """One student of every proxy, each a stage of its own."""
    config = here.config
    for one in clusters:
        name = f"distill-{one.index}"

        def work(one: Cluster = one, name: str = name) -> None:
            student = distill(
                library.teacher(one, text.sequences),
                library.saved("base"),
                text.sequences,
                nearness_SK[:, one.index],
                config.distill,
                config.run.seed,
                stage=name,
                recorder=here.recorder,
                checkpoint=here.checkpoint(name, config.distill.checkpoint_steps),
                kernels=config.run.kernels,
                bridge=library.bridge(text.sequences),
            )
            save_state(here.folder / library.student(one.index), build.state_of(student))

        outputs = [library.student(one.index)]
        here.stage(name, ["base", "cluster"], outputs, work, reads=["distill"], by=one.index)
    here.meet([f"distill-{one.index}" for one in clusters])


def _merge_and_tune(
    here: Run, text: Text, library: Library, clusters: Sequence[Cluster], nearness_SK: Tensor
) -> None:
    config = here.config
    students = [f"distill-{one.index}" for one in clusters]

    def merged() -> None:
        states = [load_state(here.folder / library.student(one.index))[0] for one in clusters]
        config_of_base = library.saved("base").config
        router_text = RouterText(text.sequences.ids, nearness_SK)
        moe: Any = merge(
            states,
            config_of_base,
            config.merge,
            config.run.seed,
            router_text,
            config.run.kernels,
        )
        save_model(here.folder / "merged", moe)

    def tuned() -> None:
        moe: Any = tune(
            library.saved("merged"),
            text.sequences,
            config.tune,
            config.merge,
            config.run.seed,
            recorder=here.recorder,
            teachers=[library.teacher(one, text.sequences) for one in clusters],
            affinity_SK=nearness_SK,
            checkpoint=here.checkpoint("tune", config.tune.checkpoint_steps, together=True),
            kernels=config.run.kernels,
            ranks=here.ranks,
        )
        if here.ranks.first:
            save_model(here.folder / library.MOE, moe, text.tokenizer)

    here.stage("merge", students, ["merged"], merged, reads=["merge"])
    reads = ["merge", "tune"]
    here.stage("tune", ["merge", "cluster"], [library.MOE], tuned, reads=reads, by="all")


def _direct(
    here: Run, text: Text, library: Library, clusters: Sequence[Cluster], nearness_SK: Tensor
) -> None:
    config = here.config

    def work() -> None:
        moe: Any = direct(
            library.upcycled(len(clusters), text.sequences, nearness_SK),
            [library.teacher(one, text.sequences) for one in clusters],
            text.sequences,
            nearness_SK,
            config.distill,
            config.tune,
            config.merge,
            config.run.seed,
            recorder=here.recorder,
            checkpoint=here.checkpoint("direct", config.tune.checkpoint_steps, together=True),
            kernels=config.run.kernels,
            ranks=here.ranks,
        )
        if here.ranks.first:
            save_model(here.folder / library.MOE, moe, text.tokenizer)

    tables = ["distill", "merge", "tune"]
    here.stage("direct", ["base", "cluster"], [library.MOE], work, reads=tables, by="all")
