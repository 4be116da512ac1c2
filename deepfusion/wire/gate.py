"""Refuses uploads that must not be used; cheapest checks first, nothing of an upload is believed.

listing and lengths -> manifest -> SHA-256 -> embedding -> names -> each tensor -> norms
"""

from __future__ import annotations

import hashlib
import math
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from .. import files
from ..messages import DeviceUpdate, Manifest, UploadRefused
from . import adapters, kept
from .audit import Audit
from .contents import codec_of
from .expected import MANIFEST_BYTES, ArchitectureSpec, Expected
from .package import EMBEDDING, MANIFEST, Sent, decode_embedding, shard_name

SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors", re.ASCII)
LARGEST = 3.4e38  # beyond it float32 has no finite sum


@contextmanager
def _refusing(device: str) -> Iterator[None]:
    """Every fault of an upload in one wording."""
    try:
        yield
    except ValueError as error:
        raise UploadRefused(f"{device}: {error}; refused, see audit.jsonl") from None


def inspect(folder: Path, expected: Expected, device: str) -> DeviceUpdate:
    """Check an upload that lies in `folder`; `device` is who sent it, as the transport says.

    Raises UploadRefused naming device, tensor and number. At most one shard is open, and one tensor
    in memory, at any time.
    """
    with _refusing(device):
        lengths = _listing(folder, expected)
        manifest = Manifest.from_json((folder / MANIFEST).read_bytes())
        spec = _facts(manifest, expected, device)
        _lengths(manifest, lengths, spec, expected)
        _hashes(folder, manifest)
        embedding = decode_embedding(
            (folder / EMBEDDING).read_bytes(), expected.embedding_dimensions
        )
        norms = _tensors(folder, manifest, spec, expected.max_update_norm)
    return DeviceUpdate(folder, manifest, embedding, norms)


def admit(
    folder: Path, expected: Expected, device: str, audit: Audit, node: str = ""
) -> DeviceUpdate:
    """`inspect`, with the decision written to the audit file first. Raises UploadRefused."""
    try:
        update = inspect(folder, expected, device)
    except UploadRefused as refusal:
        audit.append(folder, device=device, node=node, verdict="refused", reason=str(refusal))
        raise
    audit.append(folder, device=device, node=node, verdict="accepted", reason="")
    return update


def announce(manifest: bytes, embedding: bytes, expected: Expected, device: str) -> DeviceUpdate:
    """The cheap checks, for a device that has sent manifest and embedding and no shard yet.

    The result has no folder and no norms. Raises UploadRefused as `inspect` does.
    """
    with _refusing(device):
        if len(manifest) > MANIFEST_BYTES:
            raise ValueError(
                f"{MANIFEST} must have at most {MANIFEST_BYTES} bytes, got {len(manifest)}"
            )
        facts = Manifest.from_json(manifest)
        _facts(facts, expected, device)
        vector = decode_embedding(embedding, expected.embedding_dimensions)
        _embedding_hash(facts, embedding)
    return DeviceUpdate(Path(), facts, vector)


def _listing(folder: Path, expected: Expected) -> dict[str, int]:
    """Lengths by name; regular files of allowed names only, before a byte of them is read."""
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"upload {folder.name!r} must be a folder, got none")
    lengths = {}
    for entry in sorted(folder.iterdir()):
        name = entry.name
        if not stat.S_ISREG(entry.lstat().st_mode):
            raise ValueError(f"entry {name!r} must be a regular file, got a link or folder")
        if name not in (MANIFEST, EMBEDDING) and not SHARD_NAME.fullmatch(name):
            raise ValueError(
                f"entry {name!r} must be {MANIFEST}, {EMBEDDING} or a safetensors shard; "
                "pickles and other files are never opened"
            )
        lengths[name] = entry.lstat().st_size
    for name in (MANIFEST, EMBEDDING):
        if name not in lengths:
            raise ValueError(f"file {name} is missing")
    most = max(spec.max_bytes for spec in expected.architectures.values())
    if (total := sum(lengths.values())) > most:
        raise ValueError(f"upload must have at most {most} bytes, got {total}")
    if lengths[EMBEDDING] != (wanted := expected.embedding_dimensions + 4):
        raise ValueError(f"{EMBEDDING} must have {wanted} bytes, got {lengths[EMBEDDING]}")
    if lengths[MANIFEST] > MANIFEST_BYTES:
        raise ValueError(
            f"{MANIFEST} must have at most {MANIFEST_BYTES} bytes, got {lengths[MANIFEST]}"
        )
    return lengths


def _facts(manifest: Manifest, expected: Expected, device: str) -> ArchitectureSpec:
    """The manifest against what was agreed; returns the spec of its architecture."""
    if manifest.architecture not in expected.architectures:
        allowed = ", ".join(sorted(expected.architectures))
        raise ValueError(
            f"architecture must be one of {allowed}, got {manifest.architecture[:64]!r}"
        )
    spec = expected.architectures[manifest.architecture]
    whole = expected.content.kind == "weights"
    agreed: list[tuple[str, object, object]] = [
        ("protocol", expected.protocol, manifest.protocol),
        ("device", device, manifest.device),
        ("content", expected.content, manifest.content),
        ("codec", codec_of(expected.content, expected.codec), manifest.codec),
        ("tokenizer fingerprint", expected.tokenizer_fingerprint, manifest.tokenizer_fingerprint),
        ("base revision", spec.base_revision, manifest.base_revision),
        ("ties", dict(spec.ties) if whole else {}, dict(manifest.ties)),
    ]
    for what, wanted, got in agreed:
        if wanted != got:
            raise ValueError(f"{what} must be {wanted!r}, got {str(got)[:200]!r}")
    if manifest.tokens <= 0:
        raise ValueError(f"tokens must be a positive integer, got {manifest.tokens}")
    for name, value in manifest.privacy.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"privacy {name} must be finite and >= 0, got {value}")
    return spec


def _lengths(
    manifest: Manifest, lengths: Mapping[str, int], spec: ArchitectureSpec, expected: Expected
) -> None:
    """Announced against present: number, names, order and bytes of the shards."""
    if (total := sum(lengths.values())) > spec.max_bytes:
        raise ValueError(
            f"upload of {manifest.architecture} must have at most {spec.max_bytes} bytes, "
            f"got {total}"
        )
    count = len(manifest.shards)
    # an honest writer fills every shard but the last more than half
    most = 1 + 2 * spec.max_bytes // expected.shard_bytes
    if not 1 <= count <= most:
        raise ValueError(f"upload must have 1 to {most} shards, got {count}")
    for index, shard in enumerate(manifest.shards):
        if shard.name != (wanted := shard_name(index, count)):
            raise ValueError(f"shard {index + 1} must be named {wanted}, got {shard.name[:80]!r}")
        if shard.name not in lengths:
            raise ValueError(f"shard {shard.name} is missing")
        if lengths[shard.name] != shard.bytes:
            raise ValueError(
                f"shard {shard.name} must have {shard.bytes} bytes, got {lengths[shard.name]}"
            )
        if shard.bytes > expected.shard_bytes:
            raise ValueError(
                f"shard {shard.name} must have at most {expected.shard_bytes} bytes, "
                f"got {shard.bytes}"
            )
    if extra := sorted(
        lengths.keys() - {MANIFEST, EMBEDDING} - {one.name for one in manifest.shards}
    ):
        raise ValueError(f"shard {extra[0]} is not in the manifest")


def _hashes(folder: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        path = folder / shard.name
        _magic(path)
        if (got := files.sha256_of(path)) != shard.sha256:
            raise ValueError(
                f"shard {shard.name} must have sha256 {shard.sha256[:12]}, got {got[:12]}"
            )
    _embedding_hash(manifest, (folder / EMBEDDING).read_bytes())


def _embedding_hash(manifest: Manifest, embedding: bytes) -> None:
    got = hashlib.sha256(embedding).hexdigest()
    if got != manifest.embedding_sha256:
        raise ValueError(
            f"{EMBEDDING} must have sha256 {manifest.embedding_sha256[:12]}, got {got[:12]}"
        )


def _magic(path: Path) -> None:
    """Eight bytes of length, then '{': an archive under a right name begins otherwise."""
    with path.open("rb") as stream:
        head = stream.read(9)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:] != b"{" or length + 8 > path.stat().st_size:
        raise ValueError(f"shard {path.name} must begin as safetensors do, got {head[:4].hex()}..")


def _tensors(
    folder: Path, manifest: Manifest, spec: ArchitectureSpec, max_update_norm: float
) -> dict[str, float]:
    """Names exact, every part decodes, every value finite; returns |m_n - base| of each tensor."""
    found = Sent(folder, manifest, spec.base)
    for name in sorted(found.keys() - found.places):
        raise ValueError(f"tensor {name!r} is missing")
    for name in sorted(found.places - found.keys()):
        raise ValueError(f"tensor {name[:80]!r} does not belong to {manifest.architecture}")
    norms = {}
    for name, norm in _NORMS_OF[manifest.content.kind](found, manifest, spec):
        if not norm < LARGEST:
            raise ValueError(f"tensor {name!r} must differ from the base by less, got {norm}")
        if 0 < max_update_norm < norm:
            raise ValueError(
                f"tensor {name!r} must differ from the base by at most "
                f"{max_update_norm:g} (upload.max_update_norm), got {norm:.6g}"
            )
        norms[name] = norm
    return norms


Norms = Iterator[tuple[str, float]]


def _norms_of_weights(found: Sent, manifest: Manifest, spec: ArchitectureSpec) -> Norms:
    for name in found:
        base = spec.base[name]
        tensor = found[name]
        if base.is_floating_point() and not base.is_meta:
            yield name, _norm(tensor, base)


def _norms_of_adapters(found: Sent, manifest: Manifest, spec: ArchitectureSpec) -> Norms:
    """Of what the merge will add, without adding it."""
    for name in adapters.adapted(spec.base):
        yield name, adapters.norm(found[name + adapters.LEFT], found[name + adapters.RIGHT])


def _norms_of_logprobs(found: Sent, manifest: Manifest, spec: ArchitectureSpec) -> Norms:
    """Every block is checked; there is no model whose norm could be taken."""
    for name in found:
        kept.check(name, found[name], manifest.content)
    yield from ()


_NORMS_OF: Mapping[str, Callable[[Sent, Manifest, ArchitectureSpec], Norms]] = {
    "weights": _norms_of_weights,
    "adapter": _norms_of_adapters,
    "logprobs": _norms_of_logprobs,
}


def _norm(tensor: Tensor, base: Tensor) -> float:
    return float((tensor.double() - base.double().cpu()).norm())
