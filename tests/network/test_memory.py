"""The collecting process holds less than three shards, however many an upload has."""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deepfusion.flower import gather as network
from deepfusion.flower.collection import Limits, Wanted
from deepfusion.wire.package import shard_name
from tests.driver.uploads import rewrite

from .federation import Federation

pytestmark = pytest.mark.network
SHARDS, SHARD_BYTES = 10, 32 << 20


def large(folder: Path) -> None:
    """A package of ten shards of 32 MiB: whole, though no gate would take it."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    shards = []
    for index in range(SHARDS):
        # no two pieces alike: equal ones would be sent once
        block = b"".join(hashlib.sha256(b"%d %d" % (index, i)).digest() for i in range(1 << 15))
        content = b"".join(bytes([i]) + block[1:] for i in range(SHARD_BYTES // len(block)))
        name = shard_name(index, SHARDS)
        (folder / name).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        shards.append({"name": name, "bytes": len(content), "sha256": sha256})
    rewrite(folder, shards=shards)


class Watch(threading.Thread):
    """The resident memory of the collecting process: before the first shard, and at its most."""

    def __init__(self, fed: Federation) -> None:
        super().__init__(daemon=True)
        self.fed = fed
        self.before = self.most = 0
        self.over = False

    def run(self) -> None:
        process = None
        while not self.over:
            process = process or self._find()
            try:
                resident = process.memory_info().rss if process else 0
            except psutil.NoSuchProcess:
                return
            if self.fed.status(0) in ("waiting", "training"):
                self.before = max(self.before, resident)
            self.most = max(self.most, resident)
            time.sleep(0.02)

    def _find(self) -> psutil.Process | None:
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
                if "flwr-serverapp" in line and f":{self.fed.port}" in line:
                    return process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return None


def test_ten_shards_take_less_memory_than_three(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = network._wanted

    def roomy(*given: object) -> Wanted:
        wanted = genuine(*given)  # type: ignore[arg-type]
        limits = {name: Limits(one.base_revision, 1 << 30) for name, one in wanted.limits.items()}
        return replace(wanted, limits=limits, shard_bytes=SHARD_BYTES)

    monkeypatch.setattr(network, "_wanted", roomy)
    small = ("federation.num_devices=1", "federation.min_devices=1", "cluster.num_clusters=1")
    fed = federation(*small, "devices.architectures=['gpt2']", "merge.top_k=1", "merge.segments=2")
    upload = fed.trained(0, large)
    work = fed.collect()
    watch = Watch(fed)
    watch.start()
    fed.join(0)
    (received,) = fed.end(work)
    watch.over = True
    manifest = json.loads((received / "manifest.json").read_text())
    assert len(manifest["shards"]) == SHARDS
    for shard in manifest["shards"]:
        assert (received / shard["name"]).stat().st_size == SHARD_BYTES
    assert (received / "manifest.json").read_bytes() == (upload / "manifest.json").read_bytes()
    grown = (watch.most - watch.before) / SHARD_BYTES
    print(f"collecting process: {watch.before >> 20} MiB before, {grown:.2f} shards more at most")
    assert watch.before > 0, "the process was never seen"
    assert 0.5 < grown < 3, f"{grown:.2f} shards"
