"""What comes from the devices: their jobs, the gate before their uploads, and what passed it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .data.prepared import Text
from .device.gather import DeviceJob
from .ledger import Ledger, Transfer
from .messages import DeviceUpdate
from .stages import Run
from .wire.audit import Audit
from .wire.expected import Expected
from .wire.gate import inspect
from .wire.intake import device_facts, take_in

Gather = Callable[[Sequence[DeviceJob], int], list[Path]]
GOOD = "uploads.json"


def _jobs(here: Run, text: Text) -> list[DeviceJob]:
    config = here.config
    names = list(dict.fromkeys(config.devices.architectures))
    starts = here.folder / "starts"
    jobs = []
    for index, documents in enumerate(text.shards):
        turn = names.index(config.devices.architectures[index % len(config.devices.architectures)])
        jobs.append(
            DeviceJob(
                device=f"device-{index:02d}",
                architecture=names[turn],
                documents=documents,
                start=starts / f"{turn}.safetensors",
                tokenizer=Path(config.devices.tokenizer or here.folder / "tokenizer"),
                config=config,
                run_folder=here.folder,
                idf=starts / "idf.safetensors" if config.embedding.idf == "public" else None,
            )
        )
    return jobs


def collect(here: Run, text: Text, expected: Expected, gather: Gather) -> None:
    """Train the devices; judge and weigh what they upload."""
    config = here.config
    jobs = _jobs(here, text)
    folders = gather(jobs, config.federation.workers)

    def work() -> None:
        ledger, audit = Ledger(here.folder / "ledger"), Audit(here.folder / "audit.jsonl")
        for job in jobs:
            sent = [("base", job.start)] + ([("idf", job.idf)] if job.idf else [])
            for kind, path in sent:
                length = path.stat().st_size
                ledger.add(Transfer(job.device, "down", kind, length, bytes_raw=length))
        intake = take_in(folders, expected, ledger, audit, config.federation.min_devices)
        here.write("devices.json", device_facts(intake.updates, expected, ledger))
        here.write(
            GOOD,
            {
                "good": [update.device for update in intake.updates],
                "refused": intake.refused,
                "norms_unchecked": list(intake.unchecked),
            },
        )

    starts = sorted(path.stem for path in (here.folder / "stages").glob("start-*.json"))
    outputs = ["ledger.csv", "devices.json", GOOD]
    before = [*starts, *(job.device for job in jobs)]
    here.stage("gate", before, outputs, work, reads=["federation", "upload", "embedding"])


def good_updates(here: Run, expected: Expected) -> list[DeviceUpdate]:
    good = here.read(GOOD)["good"]
    return [inspect(here.folder / "uploads" / name, expected, name) for name in good]
