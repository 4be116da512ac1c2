"""Training on one device, from its architecture's common start, on its own text alone.

Devices of one architecture start from one state: the mean of nets with different beginnings means
nothing, and the server takes such means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..config import Config
from ..data.batches import Packed, Tokens, pack_tokens, tokenize
from ..data.corpora import fingerprint
from ..data.documents import Document
from ..data.encoding import Encoder
from ..messages import Content, TrainedDevice
from ..metrics import Recorder
from ..models import build, lora
from ..seeding import generator, seed_for
from ..training import train_causal_lm
from ..wire import adapters
from ..wire.contents import sent
from ..wire.package import state_revision
from .answer import Answers
from .embed import embed
from .privacy import PrivateSteps, secret_at

SECRET = ".secret"


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
    content: Content | None = None,
    public: Tensor | None = None,
) -> TrainedDevice:
    """Train on a shard; the result is what `wire.package` packs. Same arguments, same bits.

    content: what is sent, the whole model by default; public [S, L]: the text that
    log-probabilities are about. A shard below one sequence is repeated until it fills one. Raises
    ValueError for a shard without text, or a public text that is not the one of `content`.
    """
    content = content or Content()
    embedding = embed(documents, encode)
    seed = seed_for(config.run.seed, device)
    model = _begun(architecture, start, tokenizer, config, device)
    tokens = tokenize(documents, tokenizer)
    packed = _packed(documents, tokens, config, seed)
    private = _private(model, packed, config, checkpoint_path)
    privacy = private.facts() if private else {}
    train_causal_lm(
        model,
        packed,
        config.devices,
        stage=device,
        seed=seed,
        recorder=recorder,
        checkpoint_path=checkpoint_path,
        kernels=config.run.kernels,
        batches=private.batches if private else None,
        loss_of=private.loss_of if private else None,
    )
    if checkpoint_path is not None:
        files.remove(checkpoint_path.with_suffix(SECRET))
    return TrainedDevice(
        device=device,
        architecture=architecture,
        state=_answered(model, content, public, config) or _trained(model, content, start),
        base=sent(content, start),
        base_revision=state_revision(start),
        embedding=embedding,
        tokens=tokens.ids.numel(),
        tokenizer_fingerprint=fingerprint(tokenizer),
        seed=seed,
        content=content,
        privacy=privacy,
    )


def _begun(
    architecture: str,
    start: Mapping[str, Tensor],
    tokenizer: Any,
    config: Config,
    device: str,
) -> nn.Module:
    """The common start as a model, with fresh adapters where those are trained."""
    model: nn.Module = build.build(
        architecture,
        len(tokenizer),
        torch.Generator().manual_seed(0),
        config.data.context_length,
        tokenizer.eos_token_id,
    )
    build.load_state(model, start)
    model.to(config.run.device)
    if config.devices.adapter_rank:
        draw = generator(config.run.seed, "adapter", device)
        lora.add(model, adapters.adapted(start), config.devices.adapter_rank, draw)
    return model


def _trained(
    model: nn.Module, content: Content, start: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The model, or the low-rank update of it, by the names that travel."""
    if content.kind != "adapter":
        # the model is given up after this: its own memory is sent, no copy
        return build.held_state(model)
    state = {}
    for name, (left, right) in lora.factors(model, adapters.adapted(start)).items():
        state[name + adapters.LEFT] = left
        state[name + adapters.RIGHT] = right
    return state


def _answered(
    model: nn.Module, content: Content, public: Tensor | None, config: Config
) -> Mapping[str, Tensor] | None:
    """What the model says along the public text, if that is what travels."""
    if content.kind != "logprobs":
        return None
    found = None if public is None else state_revision({"ids": public})
    if public is None or found != content.text:
        raise ValueError(
            f"public text must be revision {content.text[:12]}, got {found and found[:12]}"
        )
    kernels = None if config.run.kernels == "auto" else config.run.kernels
    return Answers(model, public.long(), content, config.devices.batch_size, kernels)


def _private(
    model: nn.Module, packed: Packed, config: Config, checkpoint_path: Path | None
) -> PrivateSteps | None:
    """How a training with noise takes its steps."""
    if not config.devices.dp_noise:
        return None
    secret = secret_at(checkpoint_path and checkpoint_path.with_suffix(SECRET))
    return PrivateSteps(model, packed, config.devices, secret, config.run.kernels)


def _packed(documents: Sequence[Document], tokens: Tokens, config: Config, seed: int) -> Packed:
    """As many orders of the shard as its training will read; where one sequence is to be hidden,
    no text comes twice."""
    length, total = config.data.context_length, tokens.ids.numel()
    read = 1 if config.devices.dp_noise else config.devices.steps * config.devices.batch_size
    wanted = max(1, read) * length
    return pack_tokens(documents, tokens, length, seed, copies=max(1, -(-wanted // total)))
