"""Starts Flower's programs: SuperLink and collection for `serve`, a SuperNode for `join`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

import deepfusion

from ..config import Config
from ..config_tables import NetworkConfig
from ..messages import TransportFailed
from .child import REPLY_BYTES
from .collection import read_standings
from .control import COMPLETED, Control, RunEnd
from .door import reply_limit
from .joined import Place
from .server_app import WANTED

START_SECONDS = 60.0
STOP_SECONDS = 10.0
POLL_SECONDS = 1.0
AGAIN_SECONDS = 5.0
# nothing calls out, nothing is installed while running
SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    # glibc otherwise keeps freed pieces of messages in the heaps of Flower's threads
    "MALLOC_MMAP_THRESHOLD_": str(256 << 10),
}
PLAINTEXT = (
    "WARNING: network.plaintext = true: no encryption and no keys; anybody who reaches the port "
    "reads models and can send others. For a trial on one machine alone."
)


def environment(home: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """What Flower's programs see: our package and interpreter first, a home of their own."""
    package = str(Path(deepfusion.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    binaries = [str(Path(sys.executable).parent), *filter(None, [os.environ.get("PATH")])]
    return {
        **os.environ,
        **SETTINGS,
        "FLWR_HOME": str(home),
        "PYTHONPATH": os.pathsep.join(paths),
        # Flower calls its own programs by name
        "PATH": os.pathsep.join(binaries),
        **extra,
    }


@contextmanager
def program(
    name: str, arguments: Sequence[str], folder: Path, extra: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """One of Flower's programs while the body runs; its output goes to <folder>/<name>.log."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "deepfusion.flower.child", str(os.getpid()), name, *arguments]
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(folder / "flower", extra),
            # Ctrl-C is ours to hand on: all at once, Flower would see its own parts vanish
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds the run folder; ValueError where another process works in it."""
    path = folder / "network" / "serving"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            flock(stream, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another deepfusion process works in this run folder; wait for it, "
                "or set run.output to another one"
            ) from None
        yield


def _certificates(network: NetworkConfig, names: Sequence[str], made_by: str) -> list[Path]:
    paths = [Path(network.keys) / name for name in names]
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"network.keys must be a folder with {path.name}, got {network.keys!r}; "
                f"{made_by}, or set network.plaintext = true for a trial on one machine"
            )
    return paths


def _wait_for_port(network: NetworkConfig) -> None:
    """A server that was killed lets go of its port a moment later."""
    last = time.monotonic() + STOP_SECONDS
    while True:
        family = socket.AF_INET6 if ":" in network.address else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((network.address, network.port))
                return
            except OSError as error:
                if time.monotonic() > last:
                    raise TransportFailed(
                        f"cannot listen on {network.address}:{network.port}: {error.strerror}; "
                        "set network.port to a free one"
                    ) from None
        time.sleep(POLL_SECONDS)


@contextmanager
def superlink(config: Config, folder: Path, wanted: Path) -> Iterator[Control]:
    """The server's SuperLink, up and answering. Raises TransportFailed, ValueError."""
    network = config.network
    arguments = ["--host", network.address, "--port", str(network.port)]
    arguments += ["--disable-runtime-dependency-installation"]
    certificate: Path | None = None
    if network.plaintext:
        print(PLAINTEXT, file=sys.stderr, flush=True)
        arguments += ["--insecure"]
    else:
        names = ("ca.crt", "server.pem", "server.key")
        made = "`deepfusion keys DIR HOST` makes it"
        certificate, chain, key = (one.resolve() for one in _certificates(network, names, made))
        arguments += ["--ssl-ca-certfile", str(certificate), "--ssl-certfile", str(chain)]
        arguments += ["--ssl-keyfile", str(key), "--enable-supernode-auth"]
    _wait_for_port(network)
    # as the SuperLink's own parts reach it; the certificate names both
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(network.address, network.address)
    most = reply_limit(config.upload.shard_mib << 20)
    extra = {WANTED: str(wanted), REPLY_BYTES: str(most)}
    with program("superlink", arguments, folder, extra) as process:
        control = Control(f"{host}:{network.port}", certificate)
        last = time.monotonic() + START_SECONDS
        while not control.answers():
            if process.poll() is not None or time.monotonic() > last:
                raise TransportFailed(f"the SuperLink does not answer; see {folder}/superlink.log")
            time.sleep(POLL_SECONDS)
        yield control


def watch(control: Control, run: int, run_folder: Path, patience: float) -> RunEnd:
    """Show every change of a device's standing until the run is over.

    patience: seconds after which a run that ended on its own deadline must have told so.
    """
    shown: dict[str, str] = {}
    end, answered = RunEnd("pending", ""), time.monotonic()
    last = answered + patience
    while True:
        try:
            end, answered = control.end_of(run), time.monotonic()
        except TransportFailed:
            # a machine under load answers late; one that is gone never does
            if time.monotonic() - answered > START_SECONDS:
                raise
        for device, standing in read_standings(run_folder).items():
            if shown.get(device) != str(standing):
                shown[device] = str(standing)
                print(f"{device}: {standing}", flush=True)
        if end.is_over:
            return end
        if time.monotonic() > last:
            return RunEnd("finished:silent", "the collecting process outlived its deadline")
        time.sleep(POLL_SECONDS)


def check_end(end: RunEnd, folder: Path) -> None:
    """Raises TransportFailed for anything but a completed run."""
    if end.status != COMPLETED:
        raise TransportFailed(
            f"the collection ended as {end.status}: {end.details or 'no details'}; "
            f"see {folder}/superlink.log; what came in is kept, run again to go on"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _follow(process: subprocess.Popen[bytes], place: Place) -> None:
    """Say what the server said, until the SuperNode ends."""
    said = place.folder / "network" / "verdict.json"
    told = said.read_text() if said.exists() else ""
    while process.poll() is None:
        if said.exists() and (text := said.read_text()) != told:
            told = text
            verdict = json.loads(text).get("verdict")
            print(f"{place.name}: the server says: {verdict}; Ctrl-C leaves", flush=True)
        time.sleep(POLL_SECONDS)


def _why_it_ended(place: Place, server: str, log: str) -> str:
    """What the SuperNode's own words mean; raises TransportFailed where no waiting can help."""
    if "CERTIFICATE_VERIFY_FAILED" in log:
        raise TransportFailed(
            f"{server} is not the server of these keys, or goes by another name: its certificate "
            "does not fit ca.crt; `deepfusion keys DIR HOST` adds a name to the certificate"
        )
    if "Failed to activate" in log:
        return f"{server} does not know the key of {place.name}, or not yet"
    return f"the connection to {server} ended"


def join(config: Config) -> None:
    """Be one device of a federation until Ctrl-C.

    A SuperNode that ends is started again: a server that is just starting, or was restarted, knows
    no key yet. Raises TransportFailed where the server is another one.
    """
    network = config.network
    place = Place.of(config)
    folder = place.folder / "network"
    arguments = ["--superlink", f"{network.address}:{network.port}"]
    if network.plaintext:
        print(PLAINTEXT, file=sys.stderr, flush=True)
        arguments += ["--insecure"]
    else:
        made = "copy keys/device-NN from where `deepfusion keys` ran"
        certificate, key = _certificates(network, ("ca.crt", "device.key"), made)
        arguments += ["--root-certificates", str(certificate.resolve())]
        arguments += ["--auth-supernode-private-key", str(key.resolve())]
    server, log = f"{network.address}:{network.port}", folder / "supernode.log"
    with only_one(place.folder):
        path = place.write().resolve()
        arguments += ["--node-config", f'place="{path}"', "--host", "127.0.0.1"]
        print(
            f"{place.name}: joins {server}, waits to be asked; log: {log}; Ctrl-C leaves",
            flush=True,
        )
        while True:
            begun = log.stat().st_size if log.exists() else 0
            port = ["--port", str(_free_port())]
            with program("supernode", [*arguments, *port], folder.resolve(), {}) as process:
                _follow(process, place)
            with log.open("rb") as stream:
                stream.seek(begun)
                reason = _why_it_ended(place, server, stream.read().decode(errors="replace"))
            print(f"{place.name}: {reason}; tries again in {AGAIN_SECONDS:g} s", flush=True)
            time.sleep(AGAIN_SECONDS)
