"""An upload as a folder: manifest, shards, embedding; whole or absent.

    manifest.json   model-00001-of-00004.safetensors ..   embedding.bin (r int8 values, fp32 scale)

A shard holds flat pieces named `<tensor>#<part>#<piece>`. Tensors go in sorted order, a part that
does not fit into a shard goes on in the next; tied tensors go once.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import files
from ..checkpoints import find_ties
from ..messages import PROTOCOL, Manifest, ShardInfo, TrainedDevice, UploadRefused
from . import adapters, codecs
from .contents import codec_of, sent

MANIFEST, EMBEDDING = "manifest.json", "embedding.bin"
# A header entry, its name apart, is "":{"dtype":"F16","shape":[n],"data_offsets":[a,b]}, and under
# 160 bytes with numbers of 12 digits; 64 bytes are for the header's own length and alignment.
ENTRY_BYTES, HEADER_BYTES = 160, 64


def shard_name(index: int, count: int) -> str:
    """The one name that shard `index` of `count`, from 0, may have."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def encode_embedding(embedding: Tensor) -> bytes:
    """r + 4 bytes: int8 values round(127 e / max|e|), then max|e| / 127 as a little-endian float32.

    Raises ValueError if embedding [r] is all zero or not finite.
    """
    values = embedding.detach().cpu().float()
    scale = float(values.abs().max()) / 127 if values.numel() else 0.0
    if not bool(values.isfinite().all()) or scale <= 0:
        raise ValueError("embedding: must be finite and not all zero, got zeros, inf or NaN")
    codes: bytes = (values / scale).round().to(torch.int8).numpy().tobytes()
    return codes + struct.pack("<f", scale)


def decode_embedding(content: bytes, dimensions: int) -> Tensor:
    """The embedding [r] again, float32, of length 1; raises ValueError as the gate words it."""
    if len(content) != dimensions + 4:
        raise ValueError(f"embedding must have {dimensions} + 4 bytes, got {len(content)}")
    (scale,) = struct.unpack("<f", content[dimensions:])
    if not 0 < scale < float("inf"):
        raise ValueError(f"embedding's scale must be finite and positive, got {scale}")
    values = torch.frombuffer(bytearray(content[:dimensions]), dtype=torch.int8).float()
    if not bool(values.any()):
        raise ValueError("embedding must not be all zero, got zeros")
    unit: Tensor = values / values.norm()
    return unit


def state_revision(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values: the name of a base that both sides must hold."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pieces(parts: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Fill shard after shard, each at most `shard_bytes` with its header."""
    shard: dict[str, Tensor] = {}
    room = shard_bytes - HEADER_BYTES
    for name, flat in parts:
        begun = piece = 0
        while begun < flat.numel() or piece == 0:
            key = f"{name}#{piece}"
            cost = ENTRY_BYTES + len(key.encode())
            fits = max(0, room - cost) // flat.element_size()
            if fits < min(1, flat.numel()) or room < cost:
                assert shard, "a shard must hold one value: shard_bytes is checked at the door"
                yield shard
                shard, room = {}, shard_bytes - HEADER_BYTES
                continue
            piece_of = flat[begun : begun + fits]
            # safetensors refuses a piece that shares its memory
            shares = piece_of.numel() * flat.element_size() < flat.untyped_storage().nbytes()
            shard[key] = piece_of.clone() if shares else piece_of
            room -= cost + shard[key].numel() * flat.element_size()
            begun, piece = begun + shard[key].numel(), piece + 1
    yield shard


def _parts(
    trained: TrainedDevice, codec: str, ties: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(trained.state.keys() - ties.keys()):
        encoded = codecs.encode(codec, name, trained.state[name], trained.base[name])
        while encoded:
            part = next(iter(encoded))
            # nothing here may hold on to a part that the shard has taken
            yield f"{name}#{part}", encoded.pop(part)


def write_package(
    trained: TrainedDevice, folder: Path, codec: str, shard_bytes: int = 256 << 20
) -> Manifest:
    """Write one device's upload; same input, same bytes. One shard is in memory at a time.

    codec: for weights and adapters; log-probabilities go as they are. Raises ValueError for values
    the codec cannot hold, DiskFull.
    """
    longest = max(map(len, trained.base), default=0)
    if shard_bytes < (least := HEADER_BYTES + ENTRY_BYTES + 2 * longest + 64):
        raise ValueError(f"write_package: shard_bytes must be >= {least}, got {shard_bytes}")
    if missing := sorted(trained.state.keys() ^ trained.base.keys()):
        raise ValueError(f"{trained.device}: {missing[0]!r} must be in state and base, is in one")
    codec = codec_of(trained.content, codec)
    ties = find_ties(trained.state) if trained.content.kind == "weights" else {}
    with files.whole(folder) as partial:
        partial.mkdir()
        count = 0
        for count, shard in enumerate(_pieces(_parts(trained, codec, ties), shard_bytes), 1):
            save_file(shard, partial / f"{count}")
            shard.clear()  # the next one is filled while this name still holds it
        shards = []
        for index in range(count):
            path = partial / shard_name(index, count)
            (partial / f"{index + 1}").rename(path)
            shards.append(ShardInfo(path.name, path.stat().st_size, files.sha256_of(path)))
        embedding = encode_embedding(trained.embedding)
        (partial / EMBEDDING).write_bytes(embedding)
        manifest = Manifest(
            protocol=PROTOCOL,
            device=trained.device,
            architecture=trained.architecture,
            base_revision=trained.base_revision,
            tokenizer_fingerprint=trained.tokenizer_fingerprint,
            tokens=trained.tokens,
            codec=codec,
            ties=ties,
            shards=tuple(shards),
            embedding_sha256=hashlib.sha256(embedding).hexdigest(),
            seed=trained.seed,
            versions={name: version(name) for name in ("torch", "safetensors", "zstandard")},
            content=trained.content,
            privacy=trained.privacy,
        )
        (partial / MANIFEST).write_text(manifest.to_json())
    return manifest


class Shards:
    """The pieces of a package by tensor, one shard open at a time; ValueError for what is odd."""

    def __init__(self, folder: Path, count: int) -> None:
        self.paths = [folder / shard_name(index, count) for index in range(count)]
        self.places: dict[str, dict[str, list[int]]] = {}
        self._open: tuple[int, safe_open] | None = None
        for index, path in enumerate(self.paths):
            try:
                with safe_open(path, framework="pt") as stream:
                    keys = list(stream.keys())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"shard {path.name} must be safetensors: {error}") from None
            for key in keys:
                self._place(key, index)

    def _place(self, key: str, index: int) -> None:
        found = re.fullmatch(r"(.+)#([a-z]+)#(0|[1-9][0-9]{0,6})", key, re.ASCII | re.DOTALL)
        if found is None:
            raise ValueError(f"tensor name {key[:80]!r} must be <tensor>#<part>#<piece>")
        name, part, piece = found.groups()
        homes = self.places.setdefault(name, {}).setdefault(part, [])
        homes += [-1] * (int(piece) + 1 - len(homes)) if int(piece) < len(self.paths) else []
        if int(piece) >= len(homes) or homes[int(piece)] != -1:
            raise ValueError(f"tensor {name[:80]!r} part {part!r} has a piece {piece} too many")
        homes[int(piece)] = index

    def parts(self, name: str) -> dict[str, Tensor]:
        """The flat parts of one tensor."""
        return {part: self._join(name, part, homes) for part, homes in self.places[name].items()}

    def _join(self, name: str, part: str, homes: list[int]) -> Tensor:
        if -1 in homes:
            raise ValueError(f"tensor {name!r} part {part!r} lacks piece {homes.index(-1)}")
        pieces = [self._read(home, f"{name}#{part}#{piece}") for piece, home in enumerate(homes)]
        if len({piece.dtype for piece in pieces}) > 1 or any(piece.dim() != 1 for piece in pieces):
            raise ValueError(f"tensor {name!r} part {part!r} must be flat and of one type")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _read(self, index: int, key: str) -> Tensor:
        if self._open is None or self._open[0] != index:
            self._open = (index, safe_open(self.paths[index], framework="pt"))
        tensor: Tensor = self._open[1].get_tensor(key)  # type: ignore[no-untyped-call]
        return tensor


class Sent(Mapping[str, Tensor]):
    """The tensors of a package that passed the gate, each decoded when it is asked for.

    base: the common start; for codec bf16 and for log-probabilities meta tensors will do.
    """

    def __init__(self, folder: Path, manifest: Manifest, base: Mapping[str, Tensor]) -> None:
        self._shards = Shards(folder, len(manifest.shards))
        self._codec = manifest.codec
        self.places = self._shards.places.keys()
        wanted = sent(manifest.content, base)
        self._base = {name: wanted[name] for name in sorted(wanted.keys() - manifest.ties.keys())}

    def __getitem__(self, name: str) -> Tensor:
        return codecs.decode(self._codec, name, self._shards.parts(name), self._base[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def read_state(folder: Path, manifest: Manifest, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model of a package that passed the gate, float32; tied names share one tensor.

    An adapter is merged into `base`. Raises ValueError for an upload that holds no model.
    """
    found = Sent(folder, manifest, base)
    if manifest.content.kind == "adapter":
        return adapters.merged(base, found)
    if manifest.content.kind != "weights":
        raise ValueError(f"{manifest.device}: must hold a model, got {manifest.content.kind}")
    state = dict(found)
    return state | {name: state[kept] for name, kept in manifest.ties.items()}


def receive_shard(
    chunks: Iterable[bytes], inbox: Path, index: int, count: int, said: ShardInfo
) -> Path:
    """Stream one shard to disk while hashing it; nothing is kept of one that is not as announced.

    The file's name is made here; a name in the message is never a path. Raises UploadRefused.
    """
    path = inbox / shard_name(index, count)
    digest, received = hashlib.sha256(), 0
    with files.whole(path) as partial, partial.open("wb") as stream:
        for chunk in chunks:
            received += len(chunk)
            if received > said.bytes:
                raise UploadRefused(f"shard {path.name} must have {said.bytes} bytes, got more")
            digest.update(chunk)
            stream.write(chunk)
        if received < said.bytes:
            raise UploadRefused(f"shard {path.name} must have {said.bytes} bytes, got {received}")
        if digest.hexdigest() != said.sha256:
            raise UploadRefused(
                f"shard {path.name} must have sha256 {said.sha256[:12]}, "
                f"got {digest.hexdigest()[:12]}"
            )
        stream.flush()
        os.fsync(stream.fileno())
    return path
