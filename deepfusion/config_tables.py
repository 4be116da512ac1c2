"""Every key of a run: its type, default, limits and meaning, one dataclass a table of the TOML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OPTIMIZERS = ("muon", "adamw")


def key(default: Any, meaning: str, **limits: Any) -> Any:
    """One key; limits: `least`, `most` (inclusive), `above`, `below` (exclusive), `options`.

    `some` asks for a list or text that is not empty.
    """
    return field(default=default, metadata={"meaning": meaning, **limits})


@dataclass(frozen=True)
class RunConfig:
    """The run as a whole."""

    seed: int = key(7, "every random choice is drawn from it", least=0)
    output: str = key("runs/demo", "folder of all results; the same file resumes it", some=True)
    device: str = key("cpu", "where tensors live: cpu, cuda, cuda:1", some=True)
    kernels: str = key("auto", "fused kernels, or plain torch", options=("auto", "reference"))
    recipe: str = key(
        "recommended",
        "presets for keys that are not set below",
        options=("paper", "recommended", "direct"),
    )
    threads: int = key(0, "CPU threads; 0: all cores", least=0)


@dataclass(frozen=True)
class DataConfig:
    """Text, and who holds it."""

    source: str = key(
        "made", "text we make, files, or a hub name", options=("made", "files", "hub")
    )
    path: str = key("", "files: folder with <domain>/{train,validation,test}.jsonl; hub: its name")
    domains: tuple[str, ...] = key(("medical", "finance", "general"), "names of domains", some=True)
    text_column: str = key("text", "column that holds the text", some=True)
    context_length: int = key(128, "tokens of one sequence", least=8)
    vocab_size: int = key(2048, "size of the tokenizer trained on public text", least=260)
    tokenizer: str = key("", "path of a tokenizer; empty: train one on public text")
    public: str = key(
        "in-domain",
        "the server's text: a share of every domain, or one domain",
        options=("in-domain", "general"),
    )
    public_share: float = key(0.2, "share of each domain's documents", above=0.0, below=1.0)
    general_domain: str = key("general", "the domain that is public if public = 'general'")
    partition: str = key(
        "skewed", "how devices differ: by topic, or not", options=("skewed", "random")
    )
    dirichlet: float = key(0.3, "skew of topics over devices; small: strong", above=0.0)
    max_train_documents: int = key(0, "documents of one domain; 0: all", least=0)
    made_entities: int = key(160, "conditions and companies in the made world", least=8)
    private: str = key(
        "shares",
        "devices hold shares of this text; or text of their own, and all of this is public",
        options=("shares", "own"),
    )


@dataclass(frozen=True)
class FederationConfig:
    """Devices as a group."""

    num_devices: int = key(8, "devices", least=1)
    min_devices: int = key(6, "good uploads without which the run fails", least=1)
    deadline_seconds: int = key(3600, "after which nobody is waited for", least=1)
    workers: int = key(1, "devices trained at a time, one process each", least=1)
    rounds: int = key(1, "uploads of one device; the one-shot protocol knows one", options=(1,))


@dataclass(frozen=True)
class NetworkConfig:
    """Where this machine stands in a run over a network; each machine sets its own."""

    address: str = key(
        "127.0.0.1", "serve: interface to listen on; join: the server's name", some=True
    )
    port: int = key(8000, "the server's port", least=1, most=65535)
    keys: str = key("keys/server", "folder made by `deepfusion keys`; a device: keys/device-00")
    device: int = key(-1, "join, device: number of this device, from 0", least=-1)
    data: str = key("", "join, device: folder of the text on this machine; empty: data.path")
    plaintext: bool = key(False, "no encryption, no keys: a trial on one machine alone")


@dataclass(frozen=True)
class TrainingConfig:
    """What every stage that trains has."""

    steps: int = key(200, "optimiser steps", least=0)
    batch_size: int = key(8, "sequences of one step", least=1)
    lr: float = key(0.02, "largest learning rate; cosine to 0", above=0.0)
    optimizer: str = key("adamw", "muon: matrices by Muon, rest by AdamW", options=OPTIMIZERS)
    weight_decay: float = key(0.0, "decoupled weight decay of matrices", least=0.0)
    warmup_share: float = key(0.03, "share of the steps with a rising rate", least=0.0, below=1.0)
    clip: float = key(1.0, "largest norm of the gradient", above=0.0)
    checkpoint_steps: int = key(50, "steps between resumable states; 0: none", least=0)


@dataclass(frozen=True)
class DevicesConfig(TrainingConfig):
    """Training on each device."""

    architectures: tuple[str, ...] = key(
        ("gpt2", "llama", "qwen2"), "by turns: names, or paths of a config.json", some=True
    )
    tokenizer: str = key("", "path of the devices' own tokenizer; empty: the server's")
    init_steps: int = key(100, "public-text steps of each architecture's common start", least=0)
    adapter_rank: int = key(
        0, "train and send low-rank updates of the layers' matrices; 0: the whole model", least=0
    )
    dp_noise: float = key(
        0.0, "noise of DP-SGD over dp_clip; 0: no differential privacy", least=0.0
    )
    dp_clip: float = key(1.0, "largest norm of one sequence's gradient", above=0.0)
    dp_delta: float = key(1e-5, "delta at which epsilon is told", above=0.0, below=1.0)
    optimizer: str = key("muon", "muon: matrices by Muon, rest by AdamW", options=OPTIMIZERS)


@dataclass(frozen=True)
class UploadConfig:
    """Bytes from device to server."""

    kind: str = key(
        "weights",
        "the model, or its likeliest tokens along the public text",
        options=("weights", "logprobs"),
    )
    top_k: int = key(16, "tokens of a position; kind = 'logprobs'", least=1)
    public_sequences: int = key(
        0, "public sequences that are answered and taught; kind = 'logprobs'; 0: all", least=0
    )
    codec: str = key("delta-int8", "how weights are packed", options=("delta-int8", "xor", "bf16"))
    shard_mib: int = key(256, "largest file of an upload", least=1, most=256)
    max_update_norm: float = key(
        0.0, "largest |m_n - base| of a tensor; 0: 10 x the median", least=0.0
    )
    max_mib: int = key(2048, "largest upload", least=1)


@dataclass(frozen=True)
class EmbeddingConfig:
    """What a device says about the kind of its text."""

    encoder: str = key("hashed", "'hashed', or the path of a sentence encoder", some=True)
    dimensions: int = key(256, "length of the embedding, one byte each", least=2)
    idf: str = key("none", "word weights, fitted on public text", options=("none", "public"))


@dataclass(frozen=True)
class ClusterConfig:
    """Phase I: like knowledge together."""

    num_clusters: int = key(4, "clusters = domains = full-width experts", least=1)
    center: bool = key(True, "subtract the mean embedding; false: the paper's raw cosine")
    weights: str = key("uniform", "weights of a cluster's mean", options=("uniform", "tokens"))
    restarts: int = key(10, "starts of k-means; the best one counts", least=1)
    robust: str = key(
        "none",
        "average that one bad member cannot own; clusters of 3 and more",
        options=("none", "clip", "median", "trimmed"),
    )


@dataclass(frozen=True)
class BaseConfig(TrainingConfig):
    """The dense base model."""

    model: str = key("qwen2-base", "a name, or the path of a checkpoint", some=True)
    steps: int = key(300, "public-text steps from scratch; 0: as it is", least=0)
    optimizer: str = key("muon", "muon: matrices by Muon, rest by AdamW", options=OPTIMIZERS)


@dataclass(frozen=True)
class DistillConfig(TrainingConfig):
    """Phase II: proxy to base, K times: L_CE + alpha L_FM + beta L_KL."""

    steps: int = key(60, "optimiser steps of each student", least=0)
    lr: float = key(0.002, "largest learning rate; cosine to 0", above=0.0)
    alpha: float = key(0.05, "weight of the features' loss", least=0.0)
    beta: float = key(1.0, "weight of the KL loss", least=0.0)
    temperature: float = key(1.0, "of both distributions; the loss is times its square", above=0.0)
    num_stages: int = key(4, "stages whose features are compared", least=1)
    patch_size: int = key(8, "tokens of one patch", least=1)
    patchify: str = key("conv", "how a patch becomes one vector", options=("conv", "pool"))
    causal: bool = key(False, "patches see earlier patches only")
    target_norm: bool = key(True, "layer-normalise the teacher's features")
    student_norm: bool = key(
        True, "layer-normalise the student's features before they are compared"
    )
    vaa_dim: int = key(128, "width of the view-aligned attention", least=1)
    vaa_heads: int = key(4, "heads of the view-aligned attention", least=1)
    vaa_warmup_steps: int = key(25, "steps that train the attention alone, first", least=0)
    sampling: str = key(
        "affinity", "which public text a cluster sees", options=("uniform", "affinity")
    )
    nearness: str = key(
        "embedding",
        "which proxy knows a public text: by embeddings, or by how well it predicts it",
        options=("embedding", "fit"),
    )
    tokenizer_bridge: str = key(
        "shared",
        "L_KL to a proxy whose ids are the student's, or across devices.tokenizer",
        options=("shared", "mapped", "uld", "alm"),
    )
    feature_loss: str = key(
        "vaa", "attention over views, a linear map, or no L_FM", options=("vaa", "linear", "none")
    )
    optimizer: str = key("muon", "muon: matrices by Muon, rest by AdamW", options=OPTIMIZERS)


@dataclass(frozen=True)
class MergeConfig:
    """Phase III: students to one mixture of experts."""

    target: str = key("qwen2_moe", "kind of model", options=("qwen2_moe", "deepseek_v3"))
    top_k: int = key(2, "domains a token goes to", least=1)
    segments: int = key(1, "experts that one feed-forward block is split into", least=1)
    shared: str = key("none", "shared expert", options=("none", "mean"))
    shared_scale: float = key(
        0.25, "its weight; the routed part has the rest", above=0.0, below=1.0
    )
    router_init: str = key("centroids", "rows of the router", options=("normal", "centroids"))
    renormalize: bool = key(True, "weights of a token's experts add up to 1")


@dataclass(frozen=True)
class TuneConfig(TrainingConfig):
    """Phase III: train what the experts share."""

    steps: int = key(60, "optimiser steps; all of the server's where recipe = 'direct'", least=0)
    lr: float = key(0.002, "largest learning rate; cosine to 0", above=0.0)
    train: str = key("shared", "all but the experts, or all", options=("shared", "all"))
    balance_loss_weight: float = key(0.0, "pull towards equal loads", least=0.0)
    teacher_weight: float = key(1.0, "KL to the best-matching proxy; 0: the paper", least=0.0)
    teacher_threshold: float = key(
        0.05, "affinity from which on a proxy teaches", least=-1.0, most=1.0
    )
    balance_text: bool = key(True, "public text evenly over domains")
    router_supervision: float = key(0.0, "cross entropy of the router to the domain", least=0.0)
    optimizer: str = key("muon", "muon: matrices by Muon, rest by AdamW", options=OPTIMIZERS)
    agreement: bool = key(
        False, "two teachers a sequence, neither with more than half the KL's weight"
    )


@dataclass(frozen=True)
class QuarantineConfig:
    """Uploads scored on public text before any of them teaches."""

    action: str = key(
        "report", "leave out, tell, or do not score", options=("exclude", "report", "none")
    )
    bound: float = key(
        1.0, "nats per token over the uploads' median, in each domain for itself", above=0.0
    )
    sequences: int = key(16, "public sequences of each domain", least=1)


@dataclass(frozen=True)
class EvaluateConfig:
    """Figures of the report."""

    batch_size: int = key(16, "sequences at a time", least=1)
    max_tokens: int = key(0, "of one domain and split; 0: all", least=0)
    split: str = key(
        "test", "text of the figures; choose settings on validation", options=("test", "validation")
    )
    canaries: int = key(
        0, "made secrets planted in devices' text, whose exposure is told; 0: none", least=0
    )


@dataclass(frozen=True)
class ControlsConfig:
    """Models that the mixture must beat, or cannot."""

    dense: bool = key(True, "one dense base on the same stream with the same KL")
    centralised: bool = key(True, "the same mixture on all text of the devices")
    centralised_steps: int = key(0, "its steps; 0: all devices' and the server's together", least=0)
