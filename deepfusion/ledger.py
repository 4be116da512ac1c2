"""Weighs every message, both directions, and what other methods would have sent.

baseline                     bytes, from the same configuration
FedAvg of the MoE            2 x bytes(MoE) x rounds x N
partial MoE (FedJETS-like)   2 x f x bytes(MoE) x rounds x N
FedAvg of a dense model      2 x bytes(dense) x rounds x N         only if devices are alike
FedMKT logits                tokens x k x 6 B x 2 x rounds x N
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from . import files
from .messages import Manifest

BYTES_OF_LOGIT = 6  # a token id of 4 bytes and a value of 2
SMALL = ("embedding", "manifest")


@dataclass(frozen=True)
class Transfer:
    """One message. bytes_raw: the same content before packing; bytes_wasted: sent and then lost."""

    device: str
    direction: str
    kind: str
    bytes_wire: int
    node: str = ""
    model: str = ""
    parameters: int = 0
    codec: str = ""
    bytes_raw: int = 0
    round: int = 1
    retries: int = 0
    bytes_wasted: int = 0
    seconds: float = 0.0
    status: str = "done"

    def __post_init__(self) -> None:
        if self.direction not in ("up", "down"):
            raise ValueError(f"ledger: direction must be 'up' or 'down', got {self.direction!r}")
        if min(self.bytes_wire, self.bytes_raw, self.bytes_wasted) < 0:
            raise ValueError(f"ledger: bytes must be >= 0, got {self}")


@dataclass(frozen=True)
class Totals:
    """Sums over transfers."""

    bytes_up: int
    bytes_down: int
    bytes_wasted: int
    transfers: int

    @property
    def bytes_wire(self) -> int:
        """Both directions."""
        return self.bytes_up + self.bytes_down


class Ledger:
    """The transfers of one run in ledger.csv and ledger.json, read again when a run is resumed."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_suffix(".json")
        self._rows: dict[tuple[str, str, str, int], Transfer] = {}
        self._baselines: dict[str, float] = {}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            self._baselines = found["baselines"]
            for row in found["transfers"]:
                self._put(Transfer(**row))

    def _put(self, row: Transfer) -> None:
        # the same message noted twice is one transfer: a resumed run notes its uploads again
        self._rows[row.device, row.direction, row.kind, row.round] = row

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """Every transfer, ordered by device."""
        return tuple(self._rows[key] for key in sorted(self._rows))

    def add(self, *rows: Transfer) -> None:
        """Note transfers; both files are whole when this returns. Raises DiskFull."""
        for row in rows:
            self._put(row)
        self._write()

    def compare(self, baselines: Mapping[str, float]) -> None:
        """Note what other methods would have sent."""
        self._baselines = dict(baselines)
        self._write()

    def totals(self, device: str | None = None) -> Totals:
        """Sums of the run, or of one device."""
        rows = [row for row in self.transfers if device in (None, row.device)]
        return Totals(
            bytes_up=sum(row.bytes_wire for row in rows if row.direction == "up"),
            bytes_down=sum(row.bytes_wire for row in rows if row.direction == "down"),
            bytes_wasted=sum(row.bytes_wasted for row in rows),
            transfers=len(rows),
        )

    def as_dict(self) -> dict[str, Any]:
        """Transfers, totals of the run and of each device, baselines: what ledger.json holds."""
        devices = sorted({row.device for row in self.transfers})
        return {
            "transfers": [asdict(row) for row in self.transfers],
            "totals": _totals_dict(self.totals()),
            "devices": {device: _totals_dict(self.totals(device)) for device in devices},
            "baselines": self._baselines,
        }

    def _write(self) -> None:
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        names = [one.name for one in fields(Transfer)]
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in self.transfers)
        files.write_text(self.path.with_suffix(".csv"), table.getvalue())
        files.write_json(self.path, self.as_dict())


def _totals_dict(totals: Totals) -> dict[str, int]:
    return {**asdict(totals), "bytes_wire": totals.bytes_wire}


def weigh_upload(
    folder: Path,
    device: str,
    manifest: Manifest | None,
    *,
    parameters: int = 0,
    bytes_raw: int = 0,
    node: str = "",
    round: int = 1,
    seconds: float = 0.0,
    status: str = "done",
) -> list[Transfer]:
    """The rows of one package on disk: model (or adapter, logprobs), embedding, manifest.

    Bytes are the lengths of its files.

    A refused upload has been sent all the same: its bytes count, and count as wasted. Its manifest
    is None if it could not be read; an upload that never came has no bytes.
    """
    present = folder.iterdir() if folder.is_dir() else ()
    holds = manifest.content.kind if manifest else "weights"
    lengths = {path.name: path.lstat().st_size for path in present if path.is_file()}
    parts = {
        "embedding": lengths.pop("embedding.bin", 0),
        "manifest": lengths.pop("manifest.json", 0),
        "model" if holds == "weights" else holds: sum(lengths.values()),
    }
    facts = {"model": manifest.architecture, "codec": manifest.codec} if manifest else {}
    model: dict[str, Any] = {**facts, "parameters": parameters, "bytes_raw": bytes_raw}
    return [
        Transfer(
            device=device,
            direction="up",
            kind=kind,
            bytes_wire=count,
            node=node,
            round=round,
            bytes_wasted=0 if status == "done" else count,
            seconds=0.0 if kind in SMALL else seconds,
            status=status,
            **({"bytes_raw": count} if kind in SMALL else model),
        )
        for kind, count in parts.items()
    ]


def baselines(
    *,
    num_devices: int,
    rounds: int,
    moe_bytes: int,
    partial_share: float,
    public_tokens: int,
    kept_logits: int = 128,
    dense_bytes: int | None = None,
) -> dict[str, float]:
    """Name -> bytes of other methods under the same configuration: computed, never run.

    partial_share: the part of the MoE that a FedJETS-like device holds. dense_bytes None: devices
    differ, and a dense model cannot be averaged over them.
    """
    exchanges = 2 * rounds * num_devices
    said = "1 round" if rounds == 1 else f"{rounds} rounds"
    found: dict[str, float] = {
        f"FedAvg of the MoE, {said}": float(exchanges * moe_bytes),
        f"partial MoE (FedJETS-like), f = {partial_share:.2f}, {said}": partial_share
        * exchanges
        * moe_bytes,
        f"FedMKT logits, top {kept_logits}, {said}": float(
            public_tokens * kept_logits * BYTES_OF_LOGIT * exchanges
        ),
    }
    if dense_bytes is not None:
        found[f"FedAvg of a dense model, {said}"] = float(exchanges * dense_bytes)
    return found


def read_transfers(path: Path) -> Iterable[Transfer]:
    """The transfers that ledger.json holds."""
    return Ledger(path).transfers
