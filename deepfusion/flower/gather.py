"""`gather` over a network: what `device.gather` does in one process, asked of other machines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import files
from ..checkpoints import StageStore
from ..config import APART_FROM_THE_RUN, Config
from ..device.gather import DeviceJob
from ..ledger import Ledger, Transfer
from ..messages import TooFewUploads
from ..wire.audit import Audit
from ..wire.expected import load_expected
from . import launch
from .collection import Limits, SentFile, Wanted, WantedDevice, read_standings
from .control import Control

# a run that has passed its own deadline gets this long to say so
GRACE_SECONDS = 120.0
CLOSED = Path("network") / "closed.json"
# after which a device that answers nothing is asked whether it still knows the question
PROBE_SECONDS = 60.0


def gather(jobs: Sequence[DeviceJob], workers: int = 1) -> list[Path]:
    """The upload folders that came in, in the order of the jobs; `workers` is the devices' affair.

    Raises TooFewUploads naming every missing device, TransportFailed.
    """
    config, folder = jobs[0].config, jobs[0].run_folder
    store = StageStore(folder)
    left = [job for job in jobs if not store.done(job.device, job.inputs_hash())]
    key = hashlib.sha256(json.dumps([job.inputs_hash() for job in jobs]).encode()).hexdigest()
    if left and not _is_closed(folder, key):
        _collect(config, folder, left)
        _note(folder)
        for job in left:
            if _is_whole(folder, job):
                store.mark_done(job.device, job.inputs_hash(), [job.upload])
    good = [job for job in jobs if store.done(job.device, job.inputs_hash())]
    if len(good) < config.federation.min_devices:
        raise TooFewUploads(_too_few(config, folder, jobs, good))
    files.write_json(folder / CLOSED, {"inputs": key})
    return [job.upload for job in good]


def _is_closed(folder: Path, key: str) -> bool:
    """Whether these jobs were collected, and what came in was enough for the gate.

    Who was late then stays away: later stages were made without him.
    """
    closed = folder / CLOSED
    return (
        closed.exists()
        and json.loads(closed.read_text())["inputs"] == key
        and (folder / "stages" / "gate.json").exists()
    )


def _note(folder: Path) -> None:
    """What was sent down, what was sent in vain, who was turned away before an upload was whole."""
    ledger, audit = Ledger(folder / "ledger"), Audit(folder / "audit.jsonl")
    for device, one in read_standings(folder).items():
        seen: dict[str, Any] = {
            "device": device,
            "node": one.node,
            "seconds": one.seconds,
            "status": one.status,
        }
        down = Transfer(
            direction="down", kind="base", bytes_wire=one.bytes_down, retries=one.retries, **seen
        )
        ledger.add(down)
        wasted = one.bytes_wasted + (one.bytes_up if one.status == "refused" else 0)
        if wasted:
            lost = Transfer(
                direction="up", kind="wasted", bytes_wire=wasted, bytes_wasted=wasted, **seen
            )
            ledger.add(lost)
        if one.status == "refused":
            inbox = folder / "inbox" / device
            reason = f"{device}: {one.reason}; refused, see audit.jsonl"
            audit.append(inbox, device=device, node=one.node, verdict="refused", reason=reason)


def _is_whole(folder: Path, job: DeviceJob) -> bool:
    standing = read_standings(folder).get(job.device)
    return standing is not None and standing.status == "done" and job.upload.is_dir()


def _too_few(
    config: Config, folder: Path, jobs: Sequence[DeviceJob], good: Sequence[DeviceJob]
) -> str:
    standings = read_standings(folder)
    missing = [job.device for job in jobs if job not in good]
    lines = "".join(f"\n  {name}: {standings.get(name, 'never asked')}" for name in missing)
    return (
        f"gather: uploads must be at least federation.min_devices = "
        f"{config.federation.min_devices}, got {len(good)} of {len(jobs)}; run again to ask the "
        f"others again{lines}"
    )


def _collect(config: Config, folder: Path, jobs: Sequence[DeviceJob]) -> None:
    network = (folder / "network").resolve()
    wanted_path = network / "wanted.json"
    files.remove(folder / "collection.json")
    with launch.superlink(config, network, wanted_path) as control:
        nodes = _nodes(config, control, jobs)
        _wanted(config, folder, jobs, nodes).write(wanted_path)
        run = control.start(network / "app")
        where = f"{config.network.address}:{config.network.port}"
        minutes = config.federation.deadline_seconds / 60
        print(f"{where}: waits for {len(jobs)} devices, {minutes:g} minutes at most", flush=True)
        patience = config.federation.deadline_seconds + GRACE_SECONDS
        end = launch.watch(control, run, folder, patience)
    launch.check_end(end, network)


def _nodes(config: Config, control: Control, jobs: Sequence[DeviceJob]) -> dict[str, int]:
    """The node of every device; 0 where nobody can know before it says so itself."""
    if config.network.plaintext:
        return {job.device: 0 for job in jobs}
    keys = Path(config.network.keys) / "nodes"
    paths = {job.device: keys / f"{job.device}.pub" for job in jobs}
    for device, path in paths.items():
        if not path.is_file():
            raise ValueError(
                f"network.keys must hold nodes/{device}.pub, got {config.network.keys!r}; "
                f"`deepfusion keys DIR --devices {config.federation.num_devices}` makes it"
            )
    return {device: control.register(path) for device, path in paths.items()}


def _wanted(
    config: Config, folder: Path, jobs: Sequence[DeviceJob], nodes: dict[str, int]
) -> Wanted:
    expected = load_expected(folder / "expected")
    known: dict[Path, str] = {}

    def sent(name: str, path: Path) -> SentFile:
        sha256 = known.setdefault(path, known.get(path) or files.sha256_of(path))
        return SentFile(name, str(path.resolve()), path.stat().st_size, sha256)

    def files_of(job: DeviceJob) -> tuple[SentFile, ...]:
        found = [sent("starts/start.safetensors", job.start)]
        for name, path in (("idf", job.idf), ("public", job.public)):
            found += [sent(f"starts/{name}.safetensors", path)] if path else []
        tokenizer = sorted(path for path in job.tokenizer.iterdir() if path.is_file())
        return (*found, *(sent(f"tokenizer/{path.name}", path) for path in tokenizer))

    tables = {
        name: table for name, table in asdict(config).items() if name not in APART_FROM_THE_RUN
    }
    return Wanted(
        run_folder=str(folder.resolve()),
        devices=tuple(
            WantedDevice(job.device, nodes[job.device], job.architecture, files_of(job))
            for job in jobs
        ),
        limits={
            name: Limits(spec.base_revision, spec.max_bytes)
            for name, spec in expected.architectures.items()
        },
        config=tables,
        config_hash=config.hash(),
        deadline_seconds=float(config.federation.deadline_seconds),
        shard_bytes=expected.shard_bytes,
        embedding_bytes=expected.embedding_dimensions + 4,
        probe_seconds=PROBE_SECONDS,
    )
