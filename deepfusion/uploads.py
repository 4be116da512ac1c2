"""What comes from the devices: their jobs, the gate before their uploads, and what passed it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from . import files
from .checkpoints import StageStore
from .data.documents import Document
from .data.prepared import Text
from .device.gather import DeviceJob
from .ledger import Ledger, Transfer
from .messages import DeviceUpdate, TooFewUploads, device_name
from .stages import Run
from .wire.audit import Audit
from .wire.expected import Expected
from .wire.gate import inspect
from .wire.intake import device_facts, take_in
from .wire.package import MANIFEST

Gather = Callable[[Sequence[DeviceJob], int], list[Path]]
GOOD = "uploads.json"
PUBLIC = "public.safetensors"


def job_of(here: Run, device: int, documents: Sequence[Document]) -> DeviceJob:
    """What one device is asked to do; architectures go by turns."""
    config = here.config
    every = config.devices.architectures
    architecture = every[device % len(every)]
    turn = list(dict.fromkeys(every)).index(architecture)
    starts = here.folder / "starts"
    return DeviceJob(
        device=device_name(device),
        architecture=architecture,
        documents=documents,
        start=starts / f"{turn}.safetensors",
        tokenizer=Path(config.devices.tokenizer or here.folder / "tokenizer"),
        config=config,
        run_folder=here.folder,
        idf=starts / "idf.safetensors" if config.embedding.idf == "public" else None,
        public=starts / PUBLIC if config.upload.kind == "logprobs" else None,
    )


def collect(here: Run, text: Text, expected: Expected, gather: Gather) -> None:
    """Train the devices; judge and weigh what they upload."""
    config = here.config
    jobs = [job_of(here, index, documents) for index, documents in enumerate(text.shards)]
    folders = gather(jobs, config.federation.workers) if here.ranks.first else []
    here.ranks.wait()

    def work() -> None:
        ledger, audit = Ledger(here.folder / "ledger"), Audit(here.folder / "audit.jsonl")
        # over a network what went down was weighed where it was sent
        weighed = {row.device for row in ledger.transfers if row.direction == "down"}
        for job in (one for one in jobs if one.device not in weighed):
            for kind, path in (("base", job.start), ("idf", job.idf), ("public", job.public)):
                if path is None:
                    continue
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
    # over a network some may be missing; the others are enough, or gather would have raised
    before = [*starts, *(folder.name for folder in folders)]
    here.stage("gate", before, outputs, work, reads=["federation", "upload", "embedding"])


def lying_there(jobs: Sequence[DeviceJob], workers: int) -> list[Path]:
    """`gather` where uploads came by other ways: the folders that lie in uploads/.

    Raises TooFewUploads naming what is missing.
    """
    found = [job.upload for job in jobs if (job.upload / MANIFEST).is_file()]
    least = jobs[0].config.federation.min_devices
    if len(found) < least:
        missing = ", ".join(job.device for job in jobs if job.upload not in found)
        raise TooFewUploads(
            f"distill: uploads in {jobs[0].run_folder / 'uploads'} must be at least "
            f"federation.min_devices = {least}, got {len(found)}; missing: {missing}"
        )
    store = StageStore(jobs[0].run_folder)
    for folder in found:
        manifest = files.sha256_of(folder / MANIFEST)
        if not store.done(folder.name, manifest):
            store.mark_done(folder.name, manifest, [folder])
    return found


def good_updates(here: Run, expected: Expected) -> list[DeviceUpdate]:
    good = here.read(GOOD)["good"]
    return [inspect(here.folder / "uploads" / name, expected, name) for name in good]
