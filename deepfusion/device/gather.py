"""Every device in turn, or some at a time, in this machine: train, pack, and go on.

A device whose upload is whole on disk for the same inputs is not trained again.
"""

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch

from .. import files
from ..checkpoints import StageStore, load_state
from ..config import Config
from ..data.corpora import load_tokenizer
from ..data.documents import Document
from ..data.encoding import make_encoder
from ..messages import Content
from ..metrics import Recorder, stage_timer
from ..wire.package import write_package
from .train import train_device

_MIB = 1 << 20


@dataclass(frozen=True)
class DeviceJob:
    """All that one device knows: its text, its start, its tokenizer, the run's configuration.

    start: a state as `checkpoints.save_state` writes it; idf: the same with one tensor "idf", for
    embedding.idf = "public"; public: with one tensor "ids" [S, L] and a Content as facts, for
    upload.kind = "logprobs". Results go to `run_folder`: uploads/<device>, devices/<device>.jsonl.
    """

    device: str
    architecture: str
    documents: Sequence[Document]
    start: Path
    tokenizer: Path
    config: Config
    run_folder: Path
    idf: Path | None = None
    public: Path | None = None

    @property
    def upload(self) -> Path:
        """The folder of the device's package."""
        return self.run_folder / "uploads" / self.device

    @property
    def content(self) -> Content:
        """What is to be sent."""
        if self.public is not None:
            return Content(**load_state(self.public)[1])
        rank = self.config.devices.adapter_rank
        return Content("adapter", rank) if rank else Content()

    def inputs_hash(self) -> str:
        """A hash of everything that the upload depends on."""
        config = self.config
        facts = [
            config.hash("data", "devices", "upload", "embedding"),
            [config.run.seed, config.run.device, config.run.kernels],
            [self.device, self.architecture],
            [asdict(document) for document in self.documents],
            [files.sha256_of(path) for path in (self.start, self.idf, self.public) if path],
            [files.sha256_of(path) for path in sorted(self.tokenizer.glob("*.json"))],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def gather(jobs: Sequence[DeviceJob], workers: int = 1) -> list[Path]:
    """The upload folders of all jobs, in their order; `workers` processes, 1: in this one.

    What a device records while it trains is in devices/<device>.jsonl and, once it is done, in
    metrics.jsonl. Raises what a device raises.
    """
    left = [job for job in jobs if not _is_done(job)]
    if workers > 1 and len(left) > 1:
        context = get_context("spawn")
        with ProcessPoolExecutor(workers, context, _begin_worker, (workers,)) as pool:
            for job, _ in zip(left, pool.map(run_device, left), strict=True):
                _finish(job)
    else:
        for job in left:
            run_device(job)
            _finish(job)
    return [job.upload for job in jobs]


def run_device(job: DeviceJob) -> None:
    """Train one device and write its package, whole or not at all."""
    own = job.run_folder / "devices" / job.device
    recorder = Recorder(own.with_suffix(".jsonl"))
    idf = None if job.idf is None else load_state(job.idf)[0]["idf"]
    public = None if job.public is None else load_state(job.public)[0]["ids"]
    config = job.config
    with stage_timer(job.device, recorder):
        trained = train_device(
            job.architecture,
            load_state(job.start)[0],
            job.documents,
            load_tokenizer(job.tokenizer),
            config,
            job.device,
            make_encoder(config.embedding, idf),
            recorder,
            # other inputs must not go on from this training's half-way state
            own.with_name(f"{job.device}-{job.inputs_hash()[:16]}.safetensors"),
            job.content,
            public,
        )
        write_package(trained, job.upload, config.upload.codec, config.upload.shard_mib * _MIB)


def _is_done(job: DeviceJob) -> bool:
    return StageStore(job.run_folder).done(job.device, job.inputs_hash())


def _finish(job: DeviceJob) -> None:
    """Copies the device's records to the run's and marks it done."""
    recorder = Recorder(job.run_folder / "metrics.jsonl")
    for stage in (job.device, f"cost.{job.device}"):
        recorder.restart(stage)
        for line in Recorder(job.run_folder / "devices" / f"{job.device}.jsonl").lines(stage):
            values = {key: line[key] for key in line if key not in ("stage", "step")}
            recorder.record(stage, line["step"], **values)
    StageStore(job.run_folder).mark_done(job.device, job.inputs_hash(), [job.upload])


def _begin_worker(workers: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Ends this worker when the run that started it is killed; what is half done is done again."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
