"""`python benchmarks/scale.py`: seconds and peak memory of the server's small stages against N.

N simulated devices send an embedding and a manifest, no weights:

    announce   the gate's cheap checks on every manifest and embedding
    audit      one chained line a verdict, verified once
    ledger     three rows a device, one write; then CSV and JSON are read again
    group      spherical k-means inside three architectures, 64 clusters
    facts      objective, silhouette, adjusted Rand index: clusters.json

Each N runs in a process of its own; `--one N` is that process. Seconds are the processor's, of all
threads (a busy machine hardly changes them), beside the wall clock's; memory is its peak.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deepfusion.config_tables import ClusterConfig
from deepfusion.ledger import Ledger, Transfer
from deepfusion.messages import PROTOCOL, DeviceUpdate, Manifest, ShardInfo, UploadRefused
from deepfusion.seeding import generator
from deepfusion.server.cluster import Cluster, Group, clustering_facts, group
from deepfusion.wire.audit import Audit, Decision, verify
from deepfusion.wire.expected import ArchitectureSpec, Expected
from deepfusion.wire.gate import announce
from deepfusion.wire.package import encode_embedding

SIZES = (100, 1_000, 10_000, 100_000)
ARCHITECTURES, TOPICS, DIMENSIONS, CLUSTERS = ("gpt2", "llama", "qwen2"), 40, 256, 64
BAD_EVERY = 1000  # each thousandth manifest names another tokenizer
SHARD_BYTES = 945_642  # of the demo's gpt2 device

Message = tuple[str, bytes, bytes]


def expected() -> Expected:
    """What the server asks of every simulated device."""
    spec = ArchitectureSpec.of({"w": torch.empty(1, device="meta")}, "delta-int8", "r")
    return Expected(
        architectures={name: replace(spec, max_bytes=1 << 30) for name in ARCHITECTURES},
        tokenizer_fingerprint="fp",
        codec="delta-int8",
        embedding_dimensions=DIMENSIONS,
    )


def messages(num_devices: int) -> list[Message]:
    """Device, manifest and embedding as they would arrive; topics round a common direction."""
    draw = generator(7, "scale")
    common = 3 * torch.randn(DIMENSIONS, generator=draw)
    topics = torch.randn(TOPICS, DIMENSIONS, generator=draw)
    found = []
    for index in range(num_devices):
        noise = 0.5 * torch.randn(DIMENSIONS, generator=draw)
        embedding = encode_embedding(common + topics[index % TOPICS] + noise)
        device = f"device-{index:08d}"
        manifest = Manifest(
            protocol=PROTOCOL,
            device=device,
            architecture=ARCHITECTURES[index % len(ARCHITECTURES)],
            base_revision="r",
            tokenizer_fingerprint="other" if index % BAD_EVERY == BAD_EVERY - 1 else "fp",
            tokens=1000 + index,
            codec="delta-int8",
            ties={},
            shards=(ShardInfo("model-00001-of-00001.safetensors", SHARD_BYTES, "0" * 64),),
            embedding_sha256=hashlib.sha256(embedding).hexdigest(),
            seed=7,
            versions={"torch": "2.13.0", "safetensors": "0.8.0", "zstandard": "0.25.0"},
        )
        found.append((device, manifest.to_json().encode(), embedding))
    return found


def judge(sent: list[Message]) -> tuple[list[DeviceUpdate], list[Decision]]:
    """Every message through the gate's cheap checks."""
    wanted = expected()
    updates, decisions = [], []
    for device, manifest, embedding in sent:
        reason = ""
        try:
            updates.append(announce(manifest, embedding, wanted, device))
        except UploadRefused as refusal:
            reason = str(refusal)
        announced = len(manifest) + len(embedding), hashlib.sha256(manifest).hexdigest()
        verdict = "refused" if reason else "accepted"
        decisions.append(Decision(Path(), device, device, verdict, reason, announced))
    return updates, decisions


def transfers(sent: list[Message]) -> list[Transfer]:
    """Three rows a device: manifest, embedding, and the model it announced."""
    rows = []
    for device, manifest, embedding in sent:
        rows += [
            Transfer(device, "up", "manifest", len(manifest)),
            Transfer(device, "up", "embedding", len(embedding)),
            Transfer(device, "up", "model", SHARD_BYTES, model="any", codec="delta-int8"),
        ]
    return rows


def clusters_of(cells: list[Group]) -> list[Cluster]:
    """Groups as clusters whose proxies were never made."""
    return [
        Cluster(
            index=index,
            architecture=cell.members[0].architecture,
            members=tuple(update.device for update in cell.members),
            centre=cell.centre.float(),
            origin=cell.origin.float(),
            proxy={},
        )
        for index, cell in enumerate(cells)
    ]


def one_size(num_devices: int, folder: Path) -> dict[str, Any]:
    """Every stage at one N: seconds, and what came out of it."""
    seconds: dict[str, float] = {}
    wall: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begun, clock = time.process_time(), time.perf_counter()
        found = work()
        seconds[name], wall[name] = time.process_time() - begun, time.perf_counter() - clock
        return found

    sent = timed("simulate", lambda: messages(num_devices))
    updates, decisions = timed("announce", lambda: judge(sent))

    def audited() -> str:
        audit = Audit(folder / "audit.jsonl")
        for start in range(0, len(decisions), 256):
            audit.append_all(decisions[start : start + 256])
        return verify(audit.path, audit.head)

    timed("audit", audited)
    refused = len(decisions) - len(updates)
    decisions.clear()
    rows = transfers(sent)

    def weighed() -> Ledger:
        Ledger(folder / "ledger").add(*rows)
        rows.clear()
        return Ledger(folder / "ledger")

    ledger = timed("ledger", weighed)
    held = len(ledger.transfers)
    del ledger
    config = ClusterConfig(num_clusters=min(CLUSTERS, num_devices // 4))
    cells = timed("group", lambda: group(updates, config, 7))
    labels = {one.device: f"{one.architecture}/{int(one.device[7:]) % TOPICS}" for one in updates}
    facts = timed("facts", lambda: clustering_facts(clusters_of(cells), updates, labels))
    return {
        "devices": num_devices,
        "seconds": seconds,
        "wall_seconds": wall,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "accepted": len(updates),
        "refused": refused,
        "rows": held,
        "clusters": len(cells),
        "adjusted_rand_index": facts["adjusted_rand_index"],
        "silhouette": facts["silhouette"],
        "disk_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "threads": torch.get_num_threads(),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row an N."""
    stages = [name for name in results[0]["seconds"] if name != "simulate"]
    head = ["N", *(f"{name} s" for name in stages), "all s", "wall s", "peak MiB", "disk MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in results:
        own = [one["seconds"][name] for name in stages]
        cells = [f"{one['devices']:,}", *(f"{value:.2f}" for value in own), f"{sum(own):.1f}"]
        cells += [f"{sum(one['wall_seconds'].values()) - one['wall_seconds']['simulate']:.1f}"]
        cells += [f"{one['peak_mib']:.0f}", f"{one['disk_bytes'] / 1e6:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", type=int, default=0, help="measure one N and print JSON")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--out", default="", help="folder for scale.json")
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(one_size(options.one, Path(folder))))
        return
    results = []
    for size in options.sizes:
        command = [sys.executable, "-m", "benchmarks.scale", "--one", str(size)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results.append(json.loads(done.stdout))
        print(table(results), flush=True)
    if options.out:
        path = Path(options.out) / "scale.json"
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
