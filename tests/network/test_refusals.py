"""Who is not heard, and what is not taken: strangers at the door, hostile packages behind it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

from deepfusion.flower.keys import make_keys
from deepfusion.ledger import Ledger
from deepfusion.wire.audit import Audit
from deepfusion.wire.expected import load_expected
from deepfusion.wire.intake import take_in
from tests.driver.uploads import reseal, rewrite

from .federation import Federation, wait_for

pytestmark = pytest.mark.network


def log_of(folder: Path) -> str:
    path = folder / "network" / "supernode.log"
    return path.read_text() if path.exists() else ""


TURNED_AWAY = {
    "wrong-ca": "its certificate does not fit ca.crt",
    "unregistered": "does not know the key of device-00",
    "plaintext": "Connection attempt failed",
}


def test_strangers_are_not_heard_and_the_healthy_device_is(
    federation: Callable[..., Federation],
) -> None:
    """Another authority, a key that nobody registered, no encryption: all claim to be device-00,
    and are turned away before the true one comes."""
    small = ("federation.num_devices=1", "federation.min_devices=1", "cluster.num_clusters=1")
    fed = federation(*small, "devices.architectures=['gpt2']", "merge.top_k=1", "merge.segments=2")
    fed.trained(0)
    forged = fed.folder / "forged"
    make_keys(forged, (), 1)
    (forged / "other-ca").mkdir()
    for name, source in (("ca.crt", forged), ("device.key", fed.keys)):
        path = source / "device-00" / name
        (forged / "other-ca" / name).write_bytes(path.read_bytes())
    # the key of a device of ours that is registered would be heard: only the CA differs above
    (forged / "device-00" / "ca.crt").write_bytes((fed.keys / "ca.crt").read_bytes())
    strangers = {
        "wrong-ca": [f"network.keys='{forged / 'other-ca'}'"],
        "unregistered": [f"network.keys='{forged / 'device-00'}'"],
        "plaintext": ["network.plaintext=true"],
    }
    work = fed.collect()
    told = fed.folder / "join-0.out"
    for name, settings in strangers.items():
        fed.join(0, f"run.output='{fed.folder / name}'", *settings)

        def is_told(name: str = name) -> bool:
            return TURNED_AWAY[name] in told.read_text() + log_of(fed.folder / name)

        wait_for(is_told, 240, f"{name} is told")
        assert fed.status(0) == "waiting", f"{name} was let in"
        assert "SuperNode ID" not in log_of(fed.folder / name), f"{name} was let in"
    fed.join(0)
    received = fed.end(work)
    assert [folder.name for folder in received] == ["device-00"]
    assert fed.status(0) == "done"
    assert "SuperNode ID" in log_of(fed.place(0))
    assert "WARNING: network.plaintext = true" in told.read_text()


def _edit(folder: Path, frame: bytes) -> None:
    """Put another compressed frame into the first tensor of the package."""
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(one for one in sorted(tensors) if "#zstd#" in one)
    tensors[name] = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
    save_file(tensors, path)
    reseal(folder)


def _nan(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    frame = next(value for name, value in sorted(load_file(path).items()) if "#zstd#" in name)
    length = len(zstandard.decompress(frame.numpy().tobytes()))
    _edit(folder, zstandard.compress(b"\x7f" * (length // 2) + b"\xc0" * (length // 2)))


def _bomb(folder: Path) -> None:
    _edit(folder, zstandard.compress(bytes(256 << 20)))


def _anothers_name(folder: Path) -> None:
    rewrite(folder, device="device-03")


def test_hostile_packages_are_refused_and_named(federation: Callable[..., Federation]) -> None:
    """NaN and a bomb pass the network and not the gate; another's id is not even fetched."""
    fed = federation(
        "federation.num_devices=4",
        "federation.min_devices=1",
        "upload.codec='bf16'",
        "federation.deadline_seconds=300",
    )
    for device, tamper in enumerate((_nan, _bomb, _anothers_name)):
        fed.trained(device, tamper)
    fed.trained(3)
    work = fed.collect()
    for device in range(4):
        fed.join(device)
    received = fed.end(work)
    assert [folder.name for folder in received] == ["device-00", "device-01", "device-03"]
    third = fed.standings()["device-02"]
    assert third.status == "refused"
    assert "must be 'device-02', got 'device-03'" in third.reason
    wait_for(lambda: (fed.place(2) / "network" / "verdict.json").exists(), 30, "the verdict")
    told = json.loads((fed.place(2) / "network" / "verdict.json").read_text())
    assert told["verdict"].startswith("refused")

    ledger, audit = Ledger(fed.server / "ledger"), Audit(fed.server / "audit.jsonl")
    # the prepared folder was made for the default codec
    expected = replace(load_expected(fed.server / "expected"), codec="bf16")
    intake = take_in(received, expected, ledger, audit, 1)
    assert [update.device for update in intake.updates] == ["device-03"]
    assert "non-finite" in intake.refused["device-00"]
    assert "device-01" in intake.refused
    lines = [json.loads(line) for line in (fed.server / "audit.jsonl").read_text().splitlines()]
    verdicts = {line["device"]: line["verdict"] for line in lines}
    assert verdicts == {
        "device-00": "refused",
        "device-01": "refused",
        "device-02": "refused",
        "device-03": "accepted",
    }
    assert all(line["node"].isdigit() for line in lines), "the node is the transport's word"
    assert Ledger(fed.server / "ledger").totals("device-00").bytes_wasted > 0
