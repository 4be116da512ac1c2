"""Who sent what, and the verdict: one line a decision, each carrying the hash of the one before.

    previous_0 = 64 zeros        previous_i = SHA-256 of line i - 1

A line removed from the middle, or altered, breaks the chain. Lines cut off at the end show only
against a head noted elsewhere: the report prints `Audit.head`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import files

NOTHING = "0" * 64


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
        present = sorted(
            path for path in upload.glob("*") if path.is_file() and not path.is_symlink()
        )
        manifest = upload / "manifest.json"
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "node": node,
            "device": device,
            "sha256": files.sha256_of(manifest) if manifest in present else None,
            "bytes": sum(path.stat().st_size for path in present),
            "verdict": verdict,
            "reason": reason,
            "previous": self.head,
        }
        text = json.dumps(line, sort_keys=True)
        files.append_line(self.path, text, sync=True)
        self.head = _hash(text)
        return line


def _hash(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


def verify(path: Path, head: str | None = None) -> str:
    """Follow the chain and return its head; a missing file is an empty chain.

    Raises ValueError naming the first line that does not follow from the one before, or the file's
    end if it is not `head`.
    """
    previous = NOTHING
    for number, line in enumerate(files.whole_lines(path), 1):
        try:
            said = json.loads(line)["previous"]
        except (ValueError, KeyError, TypeError):
            said = None
        if said != previous:
            raise ValueError(
                f"{path}: line {number} must follow line {number - 1}, got another hash; "
                "a line was altered, removed or put in"
            )
        previous = _hash(line)
    if head is not None and previous != head:
        raise ValueError(f"{path}: must end at {head[:12]}, got {previous[:12]}; lines are missing")
    return previous
