"""Rules between keys of a configuration: what is right by itself may be wrong together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import Config

# Attention of the target must be the base's (method.md, 6); a path is judged when it is read.
BASES_THAT_CANNOT = {
    "qwen2_moe": ("gpt2", "deepseek-base"),
    "deepseek_v3": ("gpt2", "llama", "qwen2", "qwen2-base"),
}


def contradictions(config: Config) -> Iterator[str]:
    """One sentence for each rule that the configuration breaks."""
    yield from _devices(config)
    yield from _text(config)
    yield from _distillation(config)
    yield from _bridge(config)
    yield from _mixture(config)
    yield from _trust(config)
    yield from _answers(config)


def _devices(config: Config) -> Iterator[str]:
    devices, clusters = config.federation.num_devices, config.cluster.num_clusters
    architectures = len(set(config.devices.architectures))
    if config.federation.min_devices > devices:
        yield (
            "federation.min_devices must be at most federation.num_devices = "
            f"{devices}, got {config.federation.min_devices}"
        )
    if architectures > devices:
        yield (
            "federation.num_devices must be at least the number of devices.architectures = "
            f"{architectures}, got {devices}"
        )
    if clusters > devices:
        yield (
            f"cluster.num_clusters must be at most federation.num_devices = {devices}, "
            f"got {clusters}: a cluster needs a device"
        )
    if clusters < architectures:
        yield (
            "cluster.num_clusters must be at least the number of devices.architectures = "
            f"{architectures}, got {clusters}: only models of one architecture can be averaged"
        )


def _text(config: Config) -> Iterator[str]:
    text = config.data
    if config.evaluate.canaries and text.private == "own":
        yield (
            "evaluate.canaries must be 0 with data.private = 'own', got "
            f"{config.evaluate.canaries}: the server plants nothing in text it never sees"
        )
    if len(set(text.domains)) < len(text.domains):
        yield f"data.domains must be different names, got {list(text.domains)}"
    if text.source != "made" and not text.path:
        yield f"data.path must be set for data.source = {text.source!r}, got ''"
    if text.private == "own" and config.controls.centralised:
        yield (
            "controls.centralised must be false with data.private = 'own', got true: "
            "nobody holds all text"
        )
    if text.source == "files" and text.path and not Path(text.path).is_dir():
        yield f"data.path must be a folder, got {text.path!r}"
    if text.tokenizer and not Path(text.tokenizer).exists():
        yield f"data.tokenizer must be a path that exists, got {text.tokenizer!r}"
    if text.public == "general":
        if text.general_domain not in text.domains:
            yield (
                f"data.general_domain must be one of data.domains = {list(text.domains)}, "
                f"got {text.general_domain!r}"
            )
        elif len(text.domains) == 1:
            yield "data.domains must name a private domain too if data.public = 'general'"


def _distillation(config: Config) -> Iterator[str]:
    distill, length = config.distill, config.data.context_length
    if distill.patch_size > length:
        yield (
            f"distill.patch_size must be at most data.context_length = {length}, "
            f"got {distill.patch_size}"
        )
    if distill.vaa_dim % distill.vaa_heads:
        yield (
            f"distill.vaa_dim must be a multiple of distill.vaa_heads = {distill.vaa_heads}, "
            f"got {distill.vaa_dim}"
        )


def _bridge(config: Config) -> Iterator[str]:
    distill, path = config.distill, config.devices.tokenizer
    kind = distill.tokenizer_bridge
    if (kind == "shared") != (path == ""):
        yield (
            "distill.tokenizer_bridge must be 'shared' where devices.tokenizer is empty, and a "
            f"bridge where it is not, got {kind!r} and {path!r}"
        )
    if path and not Path(path).is_dir():
        yield f"devices.tokenizer must be a folder, got {path!r}"
    if kind == "shared":
        return
    # only phase II knows the bridge: elsewhere a proxy would be given ids it never learnt
    if config.run.recipe == "direct":
        yield f"run.recipe must be 'paper' or 'recommended' with a bridge, got {kind!r}"
    if config.tune.teacher_weight:
        yield f"tune.teacher_weight must be 0 with a bridge, got {config.tune.teacher_weight}"
    if config.controls.dense:
        yield "controls.dense must be false with a bridge, got true"
    if distill.nearness != "embedding":
        yield f"distill.nearness must be 'embedding' with a bridge, got {distill.nearness!r}"
    features = distill.feature_loss if distill.alpha else "none"
    if features != "none" and (features != "vaa" or distill.patchify != "pool"):
        yield (
            "distill.feature_loss must be 'none', or 'vaa' with distill.patchify = 'pool', with a "
            f"bridge, got {features!r} with {distill.patchify!r}"
        )


def _mixture(config: Config) -> Iterator[str]:
    merge, clusters = config.merge, config.cluster.num_clusters
    if merge.top_k > clusters:
        yield f"merge.top_k must be at most cluster.num_clusters = {clusters}, got {merge.top_k}"
    blind_router = merge.top_k == 1 and merge.segments == 1 and merge.renormalize
    supervised = config.tune.balance_loss_weight > 0 or config.tune.router_supervision > 0
    if blind_router and clusters > 1 and not supervised:
        yield (
            "tune.balance_loss_weight must be > 0 with merge.top_k = 1 and merge.renormalize = "
            "true, got 0.0: a lone renormalised weight is always 1 and teaches the router nothing"
        )
    if merge.target == "deepseek_v3" and clusters * merge.segments < 2:
        yield (
            "cluster.num_clusters * merge.segments must be >= 2 for merge.target = 'deepseek_v3', "
            f"got {clusters * merge.segments}"
        )
    if config.base.model in BASES_THAT_CANNOT[merge.target]:
        yield (
            f"base.model must have the attention of merge.target = {merge.target!r}, "
            f"got {config.base.model!r}"
        )


def _trust(config: Config) -> Iterator[str]:
    if config.cluster.robust != "none" and config.cluster.weights != "uniform":
        yield (
            "cluster.weights must be 'uniform' with cluster.robust = "
            f"{config.cluster.robust!r}, got {config.cluster.weights!r}: a token count is what "
            "the device says"
        )
    if config.quarantine.action == "exclude" and config.data.public == "general":
        yield (
            "quarantine.action must be 'report' or 'none' with data.public = 'general', got "
            "'exclude': without public text of its own domain an honest specialist looks bad"
        )
    taught = config.tune.teacher_weight > 0 or config.run.recipe == "direct"
    if config.tune.agreement and not taught:
        yield "tune.agreement must be false where tune.teacher_weight = 0, got true"


def _answers(config: Config) -> Iterator[str]:
    """Log-probabilities instead of models: there is nothing to look into, or to ask again."""
    if config.upload.kind != "logprobs":
        return
    distill = config.distill
    features = distill.feature_loss if distill.alpha else "none"
    if features != "none":
        yield (
            "distill.feature_loss must be 'none' with upload.kind = 'logprobs', got "
            f"{features!r}: log-probabilities have no features"
        )
    if distill.temperature != 1.0:
        yield (
            "distill.temperature must be 1.0 with upload.kind = 'logprobs', got "
            f"{distill.temperature}: only the likeliest tokens are known, at temperature 1"
        )
    if distill.tokenizer_bridge != "shared":
        yield (
            "distill.tokenizer_bridge must be 'shared' with upload.kind = 'logprobs', got "
            f"{distill.tokenizer_bridge!r}"
        )
    if config.quarantine.action == "exclude":
        yield (
            "quarantine.action must be 'report' or 'none' with upload.kind = 'logprobs', got "
            "'exclude': there is no model to score"
        )
    if config.cluster.robust != "none":
        yield (
            "cluster.robust must be 'none' with upload.kind = 'logprobs', got "
            f"{config.cluster.robust!r}"
        )
    if config.tune.agreement:
        yield "tune.agreement must be false with upload.kind = 'logprobs', got true"
