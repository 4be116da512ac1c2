"""Devices that die, hang or have no space left; servers that are killed; two at once."""

import os
import resource
import signal
import socket
import subprocess
from collections.abc import Callable

import psutil
import pytest

from deepfusion import cli
from deepfusion.device.gather import gather as in_process
from deepfusion.flower.launch import only_one
from deepfusion.messages import TooFewUploads

from .federation import ROOT, Federation, command, serve, wait_for
from .test_quick import bytes_of

pytestmark = pytest.mark.network
Make = Callable[..., Federation]


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A process and all that it started."""
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9 for all of it at once, as a power cut does."""
    for one in family(process):
        one.send_signal(signal.SIGKILL)
    process.wait(20)


def test_device_killed_in_training_comes_back_with_the_same_bytes(federation: Make) -> None:
    settings = ("devices.steps=200", "devices.checkpoint_steps=10")
    fed = federation(*settings)
    fed.trained(0)
    work = fed.collect()
    fed.join(0)
    victim = fed.join(1)
    checkpoints = fed.place(1) / "devices"
    wait_for(lambda: list(checkpoints.glob("*.safetensors")) != [], 200, "training has begun")
    assert fed.status(1) == "training"
    kill(victim)
    wait_for(lambda: fed.status(1) == "unavailable", 120, "the server notices")
    fed.join(1)
    received = fed.end(work)
    assert fed.standings()["device-01"].retries >= 1
    for got, want in zip(received, in_process(federation(*settings).jobs()), strict=True):
        assert bytes_of(got) == bytes_of(want)


def test_device_restarted_before_anybody_notices_is_asked_again(
    federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's trap: the new process keeps the node alive and knows nothing of the message."""
    monkeypatch.setattr("deepfusion.flower.gather.PROBE_SECONDS", 10.0)
    fed = federation("devices.steps=200", "devices.checkpoint_steps=10")
    fed.trained(0)
    work = fed.collect()
    fed.join(0)
    victim = fed.join(1)
    checkpoints = fed.place(1) / "devices"
    wait_for(lambda: list(checkpoints.glob("*.safetensors")) != [], 200, "training has begun")
    kill(victim)
    fed.join(1)
    fed.end(work)
    assert fed.status(1) == "done"


def test_silence_ends_at_the_deadline_and_the_next_run_asks_only_the_silent(
    federation: Make,
) -> None:
    fed = federation("federation.deadline_seconds=120")
    fed.trained(0)
    fed.trained(1)
    work = fed.collect()
    fed.join(0)
    silent = fed.join(1)
    wait_for(lambda: len(family(silent)) > 2, 150, "the node runs")
    for one in family(silent):
        one.suspend()
    with pytest.raises(TooFewUploads, match=r"device-01: (late|unavailable)") as caught:
        fed.end(work)
    assert "got 1 of 2" in str(caught.value)
    assert cli.EXIT_CODES[2] == (TooFewUploads, 3)
    upload = fed.server / "uploads" / "device-00"
    before = {path: path.stat().st_mtime_ns for path in upload.iterdir()}

    for one in family(silent):
        one.resume()
    fed.failure = None
    received = fed.end(fed.collect())
    assert [folder.name for folder in received] == ["device-00", "device-01"]
    assert list(fed.standings()) == ["device-01"], "the other one was done"
    assert before == {path: path.stat().st_mtime_ns for path in upload.iterdir()}


def test_full_disk_on_a_device_is_named_by_class_and_number_alone(federation: Make) -> None:
    fed = federation("federation.min_devices=1")
    fed.trained(0)
    work = fed.collect()
    fed.join(0)
    # the common start is larger than what this device may write
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    own = f"network.keys='{fed.keys / 'device-01'}'"
    with (fed.folder / "full.out").open("wb") as out:
        full = subprocess.Popen(
            command("join", fed.place(1), *fed.more, "network.device=1", own),
            cwd=ROOT,
            stdout=out,
            stderr=out,
            preexec_fn=limit,
        )
    fed.processes.append(full)
    received = fed.end(work)
    assert [folder.name for folder in received] == ["device-00"]
    standing = fed.standings()["device-01"]
    assert standing.status == "failed"
    assert standing.reason.split()[0] in ("DiskFull", "OSError")
    everything = b"".join(
        path.read_bytes() for path in fed.server.rglob("*") if path.suffix in (".json", ".log")
    )
    assert str(fed.place(1)).encode() not in everything, "the device's own words stay there"
    assert "No space left" in (fed.place(1) / "network" / "device.log").read_text() or (
        "File too large" in (fed.place(1) / "network" / "device.log").read_text()
    )


def test_full_disk_on_the_server_is_one_sentence_and_what_came_in_is_kept(
    federation: Make,
) -> None:
    fed = federation()
    for device in range(2):
        fed.trained(device)
        fed.join(device)
    # an upload is larger, everything that the server writes before it is smaller
    size = max(path.stat().st_size for path in (fed.place(0) / "uploads").rglob("*"))
    full = serve(fed, "full.out", limit=size - 1)
    assert full.wait(300) == cli.TRANSPORT, (fed.folder / "full.out").read_text()
    assert "no space left on the disk" in (fed.folder / "full.out").read_text()
    assert not list((fed.server / "uploads").glob("device-*/*.partial"))
    received = fed.end(fed.collect())
    assert len(received) == 2


MOMENTS: dict[str, Callable[[Federation], bool]] = {
    "waiting": lambda fed: (fed.server / "collection.json").exists(),
    "training": lambda fed: "training" in {one.status for one in fed.standings().values()},
    "uploading": lambda fed: (fed.server / "uploads").exists(),
    "gate": lambda fed: has(fed, "gate"),
    "cluster": lambda fed: has(fed, "cluster"),
    "distill": lambda fed: has(fed, "distill-0"),
    "merge": lambda fed: has(fed, "merge"),
    "tune": lambda fed: has(fed, "tune"),
}


def has(fed: Federation, stage: str) -> bool:
    return (fed.server / "stages" / f"{stage}.json").exists()


@pytest.mark.parametrize(
    "moments",
    [("waiting", "training", "uploading"), ("gate", "cluster", "distill", "merge", "tune")],
    ids=["collecting", "computing"],
)
def test_server_killed_in_each_stage_ends_in_the_same_mixture(
    federation: Make, moments: tuple[str, ...]
) -> None:
    fed = federation()
    for device in range(2):
        if "gate" in moments:
            fed.trained(device)
        fed.join(device)
    for name in moments:
        process = serve(fed, f"serve-{name}.out")
        wait_for(
            lambda name=name, process=process: MOMENTS[name](fed) or process.poll() is not None,
            300,
            f"serve reaches {name}",
        )
        assert process.poll() is None, (fed.folder / f"serve-{name}.out").read_text()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    last = serve(fed, "serve-last.out")
    assert last.wait(600) == 0, (fed.folder / "serve-last.out").read_text()

    alone = federation()
    ran = subprocess.run(command("run", alone.server), cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for file in ("global_moe/model.safetensors", "uploads.json"):
        assert (fed.server / file).read_bytes() == (alone.server / file).read_bytes(), file


def test_two_at_once(federation: Make) -> None:
    """Two federations on one machine, each with a server, a port and a device of its own."""
    small = ("federation.num_devices=1", "federation.min_devices=1", "cluster.num_clusters=1")
    small = (*small, "devices.architectures=['gpt2']", "merge.top_k=1", "merge.segments=2")
    feds = [federation(*small) for _ in range(2)]
    works = []
    for fed in feds:
        fed.trained(0)
        fed.join(0)
        works.append(fed.collect())
    for fed, work in zip(feds, works, strict=True):
        assert [folder.name for folder in fed.end(work)] == ["device-00"]


def test_a_run_folder_in_use_is_one_sentence(federation: Make) -> None:
    fed = federation()
    with only_one(fed.server):
        process = serve(fed, "second.out")
        assert process.wait(300) == cli.FAILED
    told = (fed.folder / "second.out").read_text()
    assert "another deepfusion process works in this run folder" in told
    assert "Traceback" not in told


def test_a_port_that_is_taken_is_one_sentence(federation: Make) -> None:
    fed = federation()
    with socket.socket() as other:
        other.bind(("127.0.0.1", fed.port))
        other.listen()
        process = serve(fed, "taken.out")
        assert process.wait(300) == cli.TRANSPORT
    told = (fed.folder / "taken.out").read_text()
    assert f"cannot listen on 127.0.0.1:{fed.port}" in told
    assert "Traceback" not in told
