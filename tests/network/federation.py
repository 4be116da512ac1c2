"""Real SuperLinks and SuperNodes on loopback, with TLS and keys: what network tests stand on."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from deepfusion import config as configuration
from deepfusion.checkpoints import StageStore
from deepfusion.config import Config
from deepfusion.device.gather import DeviceJob, run_device
from deepfusion.flower import gather as network
from deepfusion.flower.collection import Standing, read_standings
from deepfusion.uploads import job_of

ROOT = Path(__file__).parents[2]
DEVICES = 2
KEYS = 4
TINY = (
    "run.threads=1",
    "data.made_entities=12",
    "data.domains=['medical','finance']",
    "data.context_length=64",
    "data.vocab_size=320",
    "data.partition='random'",
    f"federation.num_devices={DEVICES}",
    f"federation.min_devices={DEVICES}",
    "federation.deadline_seconds=900",
    "devices.steps=2",
    "devices.init_steps=1",
    "devices.batch_size=1",
    "devices.architectures=['gpt2','qwen2']",
    "base.steps=1",
    "base.batch_size=1",
    "cluster.num_clusters=2",
    "distill.steps=1",
    "distill.batch_size=1",
    "distill.vaa_warmup_steps=1",
    "distill.vaa_dim=16",
    "distill.vaa_heads=1",
    "tune.steps=1",
    "tune.batch_size=1",
    "evaluate.max_tokens=64",
    "controls.dense=false",
    "controls.centralised=false",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def configured(folder: Path, *more: str) -> Config:
    """The tiny configuration whose results go to `folder`."""
    file = folder.parent / f"{folder.name}.toml"
    file.write_text("")
    return configuration.load(file, [*TINY, f"run.output='{folder}'", *more])


def command(verb: str, folder: Path, *more: str) -> list[str]:
    """The command line of a verb on the tiny configuration."""
    file = folder.parent / f"{folder.name}.toml"
    file.write_text("")
    settings = [part for one in (*TINY, f"run.output='{folder}'", *more) for part in ("--set", one)]
    return [sys.executable, "-m", "deepfusion.cli", verb, str(file), *settings]


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A process of ours in a session of its own, so that a test can kill all of it."""
    with log.open("ab") as out:
        return subprocess.Popen(
            arguments,
            cwd=ROOT,
            stdout=out,
            stderr=out,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def wait_for(what: Callable[[], bool], seconds: float, why: str) -> None:
    last = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < last, f"after {seconds} s still not: {why}"
        time.sleep(0.2)


class Federation:
    """One server folder, device folders beside it, and everything that was started."""

    def __init__(self, folder: Path, keys: Path, prepared: Path, *more: str) -> None:
        self.folder = folder
        self.keys = keys
        self.port = free_port()
        self.more = (*more, f"network.port={self.port}")
        self.server = folder / "server"
        # base, starts and tokenizer are the same for every test
        shutil.copytree(prepared, self.server)
        self.config = configured(self.server, *self.more, f"network.keys='{keys / 'server'}'")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.failure: BaseException | None = None
        self.folders: list[Path] = []

    def jobs(self) -> list[DeviceJob]:
        """The jobs as `serve` makes them."""
        from deepfusion.data.prepared import prepare
        from deepfusion.stages import Run

        here = Run(self.config, self.server)
        text = prepare(self.config, self.server / "tokenizer")
        return [job_of(here, index, shard) for index, shard in enumerate(text.shards)]

    def place(self, device: int) -> Path:
        return self.folder / f"machine-{device}"

    def join(self, device: int, *more: str, keys: Path | None = None) -> subprocess.Popen[bytes]:
        """`deepfusion join` on a machine of its own."""
        own = keys or self.keys / f"device-{device:02d}"
        settings = (*self.more, f"network.device={device}", f"network.keys='{own}'", *more)
        process = start(
            command("join", self.place(device), *settings), self.folder / f"join-{device}.out"
        )
        self.processes.append(process)
        return process

    def collect(self) -> threading.Thread:
        """`gather` in a thread, once its SuperLink answers; see `end`."""

        def work() -> None:
            try:
                self.folders = network.gather(self.jobs())
            except (Exception, SystemExit) as failure:
                self.failure = failure

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        wait_for(
            lambda: (self.server / "collection.json").exists() or not thread.is_alive(),
            300,
            "the collection is under way",
        )
        return thread

    def end(self, thread: threading.Thread, seconds: float = 600) -> list[Path]:
        """The folders that came in; raises what `gather` raised."""
        thread.join(seconds)
        assert not thread.is_alive(), f"after {seconds} s still collecting: {self.standings()}"
        if self.failure is not None:
            raise self.failure
        return self.folders

    def standings(self) -> dict[str, Standing]:
        return read_standings(self.server)

    def status(self, device: int) -> str:
        found = self.standings().get(f"device-{device:02d}")
        return found.status if found else ""

    def trained(self, device: int, tamper: Callable[[Path], None] = lambda folder: None) -> Path:
        """Lets a device have its package already, as it would make it, or tampered with."""
        job = self.jobs()[device]
        own = DeviceJob(**{**vars(job), "run_folder": self.place(device)})
        run_device(own)
        tamper(own.upload)
        StageStore(own.run_folder).mark_done(own.device, own.inputs_hash(), [own.upload])
        return own.upload

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                # a machine under load takes its time; what a test wanted to know is known
                process.kill()
                process.wait()


def serve(fed: Federation, log: str, limit: int = 0) -> subprocess.Popen[bytes]:
    """`deepfusion serve` on the federation's folder; limit: the largest file it may write."""

    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = command("serve", fed.server, *fed.more, f"network.keys='{fed.keys / 'server'}'")
    with (fed.folder / log).open("wb") as out:
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            stdout=out,
            stderr=out,
            preexec_fn=limited,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    fed.processes.append(process)
    return process
