"""Files that are whole or absent, and one sentence where the disk is full.

Everything is written under a temporary name, forced to the disk, and renamed. A process killed
while writing leaves a name ending in `.partial`, which nobody reads and the next writer removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial"
CHUNK_BYTES = 1 << 20  # hashing is bound by SHA-256, not by the size of a read (unmeasured)
OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFull(OSError):
    """The file system took no more bytes; the half-written file has been removed."""


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Turns every spelling of 'no space left' into one error that names the file and the fix."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors hands the system's number on inside its text only
        number = getattr(error, "errno", None)
        found = re.search(r"os error (\d+)", str(error)) if number is None else None
        number = int(found.group(1)) if found else number
        if number not in OUT_OF_SPACE:
            raise
        raise DiskFull(
            f"{path}: no space left on the disk while writing; nothing half-written is kept; "
            "free some space or set run.output to another disk, then run again"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path beside `path` that takes its place at the end, or of which nothing is left.

    The body may write a file or make a folder there. Raises DiskFull.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, stale = (path.with_name(path.name + end) for end in (PARTIAL, ".old" + PARTIAL))
    remove(partial)
    remove(stale)
    try:
        with _one_sentence(path):
            yield partial
            for written in sorted(partial.rglob("*")) if partial.is_dir() else ():
                _sync(written)
            _sync(partial)
            # NOTE: a folder cannot be replaced in one step, and removing it takes many: it is moved
            # aside first, so that a process killed here leaves it whole or absent, never thinned.
            if path.is_dir():
                path.replace(stale)
            partial.replace(path)
            _sync(path.parent)
            remove(stale)
    except BaseException:
        remove(partial)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with whole(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, facts: Any) -> None:
    """Write facts as JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(facts, indent=1, sort_keys=True) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write one safetensors file, whole or not at all; tensors must not share storage."""
    # a process that answers one message of the network must not pay for torch
    from safetensors.torch import save_file

    with whole(path) as partial:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, partial, dict(facts)
        )


def append_line(path: Path, line: str, *, sync: bool = False) -> None:
    """Append one line in one write: a killed process leaves at most one unfinished last line."""
    append_lines(path, [line], sync=sync)


def append_lines(path: Path, lines: Sequence[str], *, sync: bool = True) -> None:
    """Append lines in one write, all or none where the disk is full."""
    assert not any("\n" in line for line in lines), "a line holds no line break"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _one_sentence(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            payload = "".join(f"{line}\n" for line in lines).encode()
            try:
                written = os.write(descriptor, payload)
                if written != len(payload):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(descriptor, before)
                raise
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def whole_lines(path: Path) -> list[str]:
    """The finished lines of a file; a torn last one is no line, a missing file has none."""
    return list(each_whole_line(path))


def each_whole_line(path: Path) -> Iterator[str]:
    """`whole_lines` one at a time, for files that need not fit into memory."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="\n") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield line[:-1]


def drop_unfinished_line(path: Path) -> None:
    """Cut off what a killed process left behind the last line break."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        kept = end
        while kept > 0:
            start = max(0, kept - CHUNK_BYTES)
            stream.seek(start)
            found = stream.read(kept - start).rfind(b"\n")
            if found >= 0:
                kept = start + found + 1
                break
            kept = start
        if kept < end:
            stream.truncate(kept)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hexadecimal digits, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()
