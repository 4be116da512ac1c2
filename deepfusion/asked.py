"""What devices are asked for, and the part of the public text that they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints import save_state
from .config import Config
from .data.prepared import Text
from .messages import Content
from .seeding import generator
from .wire.expected import ArchitectureSpec, Expected
from .wire.package import state_revision


def content_of(config: Config, text: Text) -> Content:
    """What the devices of a run send, as both sides must say it."""
    if config.upload.kind == "logprobs":
        ids = taught(config, text).sequences.ids
        return Content(
            kind="logprobs",
            top_k=config.upload.top_k,
            rows=ids.shape[0] * (ids.shape[1] - 1),
            vocabulary=len(text.tokenizer),
            text=state_revision({"ids": ids.int()}),
        )
    if config.devices.adapter_rank:
        return Content(kind="adapter", rank=config.devices.adapter_rank)
    return Content()


def taught(config: Config, text: Text) -> Text:
    """The text with those public sequences alone that teachers answer: all, or as many as
    upload.public_sequences says, drawn evenly by the seed."""
    wanted = config.upload.public_sequences
    if config.upload.kind != "logprobs" or not 0 < wanted < len(text.sequences):
        return text
    draw = generator(config.run.seed, "public", "answered")
    rows = torch.randperm(len(text.sequences), generator=draw)[:wanted].sort().values
    return replace(text, sequences=text.sequences.take(rows))


def save_public(path: Path, config: Config, text: Text) -> None:
    """Write the public text that devices download to answer, if they are asked to."""
    content = content_of(config, text)
    if content.kind == "logprobs" and not path.exists():
        save_state(path, {"ids": taught(config, text).sequences.ids.int()}, asdict(content))


def expectation(
    config: Config,
    bases: Mapping[str, Mapping[str, Tensor]],
    tokenizer_fingerprint: str,
    content: Content,
) -> Expected:
    """What the gate holds every upload to; bases: the common start of each architecture."""
    upload = config.upload
    return Expected(
        architectures={
            name: ArchitectureSpec.of(
                base, upload.codec, state_revision(base), upload.max_mib, content
            )
            for name, base in bases.items()
        },
        tokenizer_fingerprint=tokenizer_fingerprint,
        codec=upload.codec,
        embedding_dimensions=config.embedding.dimensions,
        max_update_norm=upload.max_update_norm,
        shard_bytes=upload.shard_mib << 20,
        content=content,
    )
