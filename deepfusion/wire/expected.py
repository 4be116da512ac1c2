"""What the server expects of an upload: names, shapes, types and ties by architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .. import files
from ..checkpoints import find_ties, load_state, save_state
from ..messages import PROTOCOL, Content
from . import codecs
from .contents import codec_of, sent
from .package import ENTRY_BYTES, HEADER_BYTES, state_revision

MANIFEST_BYTES = 1 << 20  # 256 MiB shards of 200 bytes each: room for a terabyte of weights


@dataclass(frozen=True)
class ArchitectureSpec:
    """One allowed architecture; base: its common start by name, meta where there is none."""

    base: Mapping[str, Tensor]
    base_revision: str
    ties: Mapping[str, str]
    max_bytes: int

    @classmethod
    def of(
        cls,
        base: Mapping[str, Tensor],
        codec: str,
        base_revision: str,
        max_mib: int = 2048,
        content: Content | None = None,
    ) -> ArchitectureSpec:
        """The spec of a state dict, whose largest honest upload bounds every upload.

        Raises ValueError if even an honest upload would be longer than `max_mib`: nothing is
        allocated before that, so a meta state of any size may be asked about.
        """
        content = content or Content()
        codec, travels = codec_of(content, codec), sent(content, base)
        ties = find_ties(base)
        tied = ties if content.kind == "weights" else {}
        unique = {name: tensor for name, tensor in travels.items() if name not in tied}
        honest = sum(codecs.largest_bytes(codec, tensor) for tensor in unique.values())
        # a tensor has at most two parts, and a part one piece more for every shard it crosses
        headers = sum(2 * (ENTRY_BYTES + len(name)) for name in unique) + HEADER_BYTES
        most = honest + headers + honest // 64 + 2 * MANIFEST_BYTES
        if most > max_mib << 20:
            values = sum(tensor.numel() for tensor in unique.values())
            raise ValueError(
                f"upload.max_mib must be >= {(most >> 20) + 1} for {content.kind} of "
                f"{values} parameters, got {max_mib}"
            )
        return cls(base, base_revision, ties, most)


@dataclass(frozen=True)
class Expected:
    """What every upload of this run must agree with. max_update_norm 0: only the median rule."""

    architectures: Mapping[str, ArchitectureSpec]
    tokenizer_fingerprint: str
    codec: str
    embedding_dimensions: int
    protocol: int = PROTOCOL
    max_update_norm: float = 0.0
    shard_bytes: int = 256 << 20
    content: Content = field(default_factory=Content)


def save_expected(folder: Path, expected: Expected) -> None:
    """Write what the gate needs, so that an upload can be checked again by hand."""
    with files.whole(folder) as partial:
        partial.mkdir()
        facts: dict[str, object] = {
            key: value for key, value in vars(expected).items() if key != "architectures"
        }
        facts["content"] = asdict(expected.content)
        architectures = []
        for index, (name, spec) in enumerate(sorted(expected.architectures.items())):
            shapes = {key: [str(one.dtype), list(one.shape)] for key, one in spec.base.items()}
            has_values = not any(one.is_meta for one in spec.base.values())
            if has_values:
                save_state(partial / f"base-{index}.safetensors", spec.base)
            architectures.append(
                {
                    "name": name,
                    "base_revision": spec.base_revision,
                    "max_bytes": spec.max_bytes,
                    "ties": dict(spec.ties),
                    "base": f"base-{index}.safetensors" if has_values else None,
                    "shapes": shapes,
                }
            )
        files.write_json(partial / "expected.json", {**facts, "architectures": architectures})


def load_expected(folder: Path) -> Expected:
    """Read what `save_expected` wrote; raises ValueError if a base is not the one it names."""
    facts = json.loads((folder / "expected.json").read_text())
    architectures = {}
    for one in facts.pop("architectures"):
        if one["base"] is None:
            base = {
                name: torch.empty(shape, dtype=getattr(torch, kind.split(".")[1]), device="meta")
                for name, (kind, shape) in one["shapes"].items()
            }
        else:
            base, _ = load_state(folder / one["base"])
            if (found := state_revision(base)) != one["base_revision"]:
                raise ValueError(
                    f"{folder / one['base']}: must be base revision {one['base_revision'][:12]}, "
                    f"got {found[:12]}"
                )
        architectures[one["name"]] = ArchitectureSpec(
            base, one["base_revision"], one["ties"], one["max_bytes"]
        )
    facts["content"] = Content(**facts["content"])
    return Expected(architectures=architectures, **facts)
