"""Weighs every message, both directions, and what other methods would have sent.

baseline                     bytes, from the same configuration
FedAvg of the MoE            2 x bytes(MoE) x rounds x N
partial MoE (FedJETS-like)   2 x f x bytes(MoE) x rounds x N
FedAvg of a dense model      2 x bytes(dense) x rounds x N         only if devices are alike
FedMKT logits                tokens x k x 6 B x 2 x rounds x N

Small ledgers are rewritten at every message. A large one notes messages in a journal beside it and
is rewritten when that has grown by a quarter: N messages cost O(N), and none is lost in between.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from . import files
from .messages import Manifest

BYTES_OF_LOGIT = 6  # a token id of 4 bytes and a value of 2
SMALL = ("embedding", "manifest")
SMALL_ROWS, GROWTH = 256, 4


@dataclass(frozen=True, slots=True)
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
        self.journal = path.with_suffix(".journal.jsonl")
        self._rows: dict[tuple[str, str, str, int], Transfer] = {}
        self._baselines: dict[str, float] = {}
        self._unsaved = 0
        if self.path.exists():
            with self.path.open() as stream:
                self._baselines = json.loads(stream.readline() + "]}")["baselines"]
                for line in stream:
                    if line.startswith("{"):
                        self._put(_transfer(line.rstrip(",\n")))
        files.drop_unfinished_line(self.journal)
        for line in files.whole_lines(self.journal):
            self._put(_transfer(line))
            self._unsaved += 1

    def _put(self, row: Transfer) -> None:
        # the same message noted twice is one transfer: a resumed run notes its uploads again
        self._rows[row.device, row.direction, row.kind, row.round] = row

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """Every transfer, ordered by device."""
        return tuple(self._rows[key] for key in sorted(self._rows))

    def add(self, *rows: Transfer) -> None:
        """Note transfers; they are on the disk when this returns. Raises DiskFull."""
        for row in rows:
            self._put(row)
        self._unsaved += len(rows)
        held = len(self._rows)
        if held <= SMALL_ROWS or self._unsaved * GROWTH >= held:
            self.write()
        else:
            files.append_lines(self.journal, [_line(row) for row in rows])

    def compare(self, baselines: Mapping[str, float]) -> None:
        """Note what other methods would have sent."""
        self._baselines = dict(baselines)
        self.write()

    def totals(self, device: str | None = None) -> Totals:
        """Sums of the run, or of one device."""
        return _sum(row for row in self._rows.values() if device in (None, row.device))

    def by_device(self) -> dict[str, Totals]:
        """Sums of every device, ordered by name."""
        rows = sorted(self._rows.values(), key=_device_of)
        return {device: _sum(own) for device, own in groupby(rows, key=_device_of)}

    def as_dict(self) -> dict[str, Any]:
        """Transfers, totals of the run and of each device, baselines: what ledger.json holds."""
        return {**self._sums(), "transfers": [_dict(row) for row in self.transfers]}

    def _sums(self) -> dict[str, Any]:
        return {
            "totals": _totals_dict(self.totals()),
            "devices": {device: _totals_dict(own) for device, own in self.by_device().items()},
            "baselines": self._baselines,
        }

    def write(self) -> None:
        """Make both files whole and drop the journal. Raises DiskFull."""
        ordered = self.transfers
        with files.whole(self.path.with_suffix(".csv")) as partial, partial.open("w") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(NAMES)
            writer.writerows([getattr(row, name) for name in NAMES] for row in ordered)
        with files.whole(self.path) as partial, partial.open("w") as stream:
            # a row a line, written and read one by one: the whole text is never in memory
            stream.write(json.dumps(self._sums(), sort_keys=True)[:-1] + ', "transfers": [')
            for index, row in enumerate(ordered):
                stream.write(("," if index else "") + "\n" + _line(row))
            stream.write("\n]}\n")
        files.remove(self.journal)
        self._unsaved = 0


NAMES = tuple(one.name for one in fields(Transfer))


def _dict(row: Transfer) -> dict[str, Any]:
    return {name: getattr(row, name) for name in NAMES}


def _line(row: Transfer) -> str:
    return json.dumps(_dict(row), sort_keys=True)


def _transfer(line: str) -> Transfer:
    row: dict[str, Any] = json.loads(line)
    # a few words that every row repeats: kept once
    interned: dict[str, Any] = {
        name: sys.intern(value) if isinstance(value, str) else value for name, value in row.items()
    }
    return Transfer(**interned)


def _device_of(row: Transfer) -> str:
    return row.device


def _sum(rows: Iterable[Transfer]) -> Totals:
    up = down = wasted = count = 0
    for row in rows:
        up += row.bytes_wire if row.direction == "up" else 0
        down += row.bytes_wire if row.direction == "down" else 0
        wasted += row.bytes_wasted
        count += 1
    return Totals(bytes_up=up, bytes_down=down, bytes_wasted=wasted, transfers=count)


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
