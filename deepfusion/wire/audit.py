"""Who sent what, and the verdict: one line a decision, each carrying the hash of the one before.

    previous_0 = 64 zeros        previous_i = SHA-256 of line i - 1

A line removed from the middle, or altered, breaks the chain. Lines cut off at the end show only
against a head noted elsewhere: the report prints `Audit.head`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import files

NOTHING = "0" * 64
HEAD = re.compile(r"audit chain: SHA-256 ([0-9a-f]{64})")  # as the report prints it


class Audit:
    """The append-only file of one run; a torn last line of a killed run is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files.drop_unfinished_line(path)
        self.head = verify(path)

    def append(
        self, upload: Path, *, device: str, node: str, verdict: str, reason: str
    ) -> Mapping[str, Any]:
        """Note one decision; the bytes are on the disk when this returns. Raises DiskFull."""
        (line,) = self.append_all([Decision(upload, device, node, verdict, reason)])
        return line

    def append_all(self, decisions: Iterable[Decision]) -> list[Mapping[str, Any]]:
        """Note decisions in order, with one wait for the disk at the end. Raises DiskFull."""
        lines: list[Mapping[str, Any]] = []
        texts: list[str] = []
        head = self.head
        for decision in decisions:
            lines.append({**decision.facts(), "previous": head})
            texts.append(json.dumps(lines[-1], sort_keys=True))
            head = _hash(texts[-1])
        if texts:
            files.append_lines(self.path, texts)
            self.head = head
        return lines


@dataclass(frozen=True)
class Decision:
    """A verdict on the upload that lies in a folder, or on what a device announced.

    announced: bytes and SHA-256 of a manifest that came without a folder.
    """

    upload: Path
    device: str
    node: str
    verdict: str
    reason: str
    announced: tuple[int, str] | None = None

    def facts(self) -> dict[str, Any]:
        """What a line says, the link to the one before apart."""
        weight, digest = self.announced or _weigh(self.upload)
        return {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "node": self.node,
            "device": self.device,
            "sha256": digest,
            "bytes": weight,
            "verdict": self.verdict,
            "reason": self.reason,
        }


def _weigh(upload: Path) -> tuple[int, str | None]:
    """Bytes of an upload's files and the SHA-256 of its manifest, if it has one."""
    present = sorted(path for path in upload.glob("*") if path.is_file() and not path.is_symlink())
    manifest = upload / "manifest.json"
    digest = files.sha256_of(manifest) if manifest in present else None
    return sum(path.stat().st_size for path in present), digest


def _hash(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


def follow(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every line with its SHA-256, as long as each follows from the one before.

    Raises ValueError naming the first line that does not.
    """
    previous = NOTHING
    for number, line in enumerate(files.each_whole_line(path), 1):
        try:
            facts = json.loads(line)
            said = facts["previous"]
        except (ValueError, KeyError, TypeError):
            said = None
        if said != previous:
            raise ValueError(
                f"{path}: line {number} must follow line {number - 1}, got another hash; "
                "a line was altered, removed or put in"
            )
        previous = _hash(line)
        yield facts, previous


def verify(path: Path, head: str | None = None) -> str:
    """Follow the chain and return its head; a missing file is an empty chain.

    Raises ValueError naming the first line that does not follow from the one before, or the file's
    end if it is not `head`.
    """
    found = NOTHING
    for _, digest in follow(path):
        found = digest
    if head is not None and found != head:
        raise ValueError(f"{path}: must end at {head[:12]}, got {found[:12]}; lines are missing")
    return found


def examine(run_folder: Path) -> tuple[int, str]:
    """(lines, head) of a run's audit file, held against what else the run folder says.

    The head that report.md prints must be a line of the chain: else the end was cut off. The
    manifest of every upload must be the one that the device's last line names. Raises ValueError.
    """
    path, report = run_folder / "audit.jsonl", run_folder / "report.md"
    printed = HEAD.search(report.read_text()) if report.exists() else None
    told = printed[1] if printed else NOTHING
    last: dict[str, str | None] = {}
    count, head, is_told = 0, NOTHING, told == NOTHING
    for facts, digest in follow(path):
        count, head = count + 1, digest
        last[str(facts["device"])] = facts["sha256"]
        is_told = is_told or head == told
    if not is_told:
        raise ValueError(f"{path}: must hold {told[:12]}, which report.md names; lines are missing")
    for device, said in sorted(last.items()):
        manifest = run_folder / "uploads" / device / "manifest.json"
        if manifest.is_file() and (got := files.sha256_of(manifest)) != said:
            raise ValueError(
                f"{manifest}: must have sha256 {str(said)[:12]} as {path.name} says, "
                f"got {got[:12]}; the upload was changed after it was judged"
            )
    return count, head
