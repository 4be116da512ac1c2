"""Training on one device, from its architecture's common start, on its own text alone.

Devices of one architecture start from one state: the mean of nets with different beginnings means
nothing, and the server takes such means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..data.batches import Packed, Tokens, pack_tokens, tokenize
from ..data.corpora import fingerprint
from ..data.documents import Document
from ..data.encoding import Encoder
from ..messages import TrainedDevice
from ..metrics import Recorder
from ..models import build
from ..seeding import generator, seed_for
from ..training import train_causal_lm
from ..wire.package import state_revision
from .embed import embed


def common_start(
    architecture: str,
    public: Packed,
    tokenizer: Any,
    config: Config,
    recorder: Recorder,
    checkpoint_path: Path | None = None,
) -> dict[str, Tensor]:
    """The state all devices of an architecture begin with: `devices.init_steps` on public text.

    A checkpoint's folder as architecture starts from its weights.
    """
    model = build.build(
        architecture,
        len(tokenizer),
        generator(config.run.seed, "start", architecture),
        config.data.context_length,
        tokenizer.eos_token_id,
    ).to(config.run.device)
    train_causal_lm(
        model,
        public,
        replace(config.devices, steps=config.devices.init_steps),
        stage=f"start-{Path(architecture).name}",
        seed=config.run.seed,
        recorder=recorder,
        checkpoint_path=checkpoint_path,
        kernels=config.run.kernels,
    )
    return build.state_of(model)


def train_device(
    architecture: str,
    start: Mapping[str, Tensor],
    documents: Sequence[Document],
    tokenizer: Any,
    config: Config,
    device: str,
    encode: Encoder,
    recorder: Recorder,
    checkpoint_path: Path | None = None,
) -> TrainedDevice:
    """Train on a shard; the result is what `wire.package` packs. Same arguments, same bits.

    A shard below one sequence is repeated until it fills one. Raises ValueError for a shard
    without text.
    """
    embedding = embed(documents, encode)
    seed = seed_for(config.run.seed, device)
    model = build.build(
        architecture,
        len(tokenizer),
        torch.Generator().manual_seed(0),
        config.data.context_length,
        tokenizer.eos_token_id,
    )
    build.load_state(model, start)
    model.to(config.run.device)
    tokens = tokenize(documents, tokenizer)
    train_causal_lm(
        model,
        _packed(documents, tokens, config, seed),
        config.devices,
        stage=device,
        seed=seed,
        recorder=recorder,
        checkpoint_path=checkpoint_path,
        kernels=config.run.kernels,
    )
    return TrainedDevice(
        device=device,
        architecture=architecture,
        state=build.state_of(model),
        base=start,
        base_revision=state_revision(start),
        embedding=embedding,
        tokens=tokens.ids.numel(),
        tokenizer_fingerprint=fingerprint(tokenizer),
        seed=seed,
    )


def _packed(documents: Sequence[Document], tokens: Tokens, config: Config, seed: int) -> Packed:
    """As many orders of the shard as its training will read."""
    length, total = config.data.context_length, tokens.ids.numel()
    wanted = max(1, config.devices.steps * config.devices.batch_size) * length
    return pack_tokens(documents, tokens, length, seed, copies=max(1, -(-wanted // total)))
