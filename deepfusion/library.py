"""The models of a run by where they lie in its folder: made fresh, read from a state, upcycled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from .checkpoints import load_state
from .data.batches import Packed
from .data.corpora import fingerprint
from .models import build
from .seeding import generator
from .server.bridge import Bridge
from .server.cluster import Cluster
from .server.kept import KeptText
from .server.merge import mean_of, merge
from .server.router_init import RouterText
from .server.teaching import Teacher
from .stages import Run


class Library:
    """Builds a run's models on its device; every call gives a new one."""

    MOE: ClassVar[str] = "global_moe"

    def __init__(self, here: Run, tokenizer: Any, device_tokenizer: Any) -> None:
        self.here = here
        self.tokenizer = tokenizer
        self.device_tokenizer = device_tokenizer
        self._bridge: Bridge | None = None
        self.fingerprint = fingerprint(device_tokenizer)

    @staticmethod
    def student(index: int) -> str:
        """Where the student of cluster `index` lies."""
        return f"students/{index}.safetensors"

    def fresh(self, name_or_path: str, *seeds: str | int) -> Any:
        """A model of an architecture with first weights of its own."""
        return self._built(name_or_path, self.tokenizer, *seeds)

    def saved(self, folder: str) -> Any:
        """A model the run has saved as a folder: base, merged, global_moe."""
        return self.fresh(str(self.here.folder / folder))

    def of_state(self, name_or_path: str, state: Mapping[str, Tensor]) -> Any:
        """A device's model, or a proxy: an architecture that holds a state."""
        model = self._built(name_or_path, self.device_tokenizer)
        build.load_state(model, state)
        return model

    def teacher(self, cluster: Cluster, sequences: Packed) -> Teacher:
        """What a cluster teaches with: its proxy, or what its devices said of the public text."""
        if self.here.config.upload.kind == "logprobs":
            return KeptText(cluster.proxy, sequences.ids)
        proxy: nn.Module = self.of_state(cluster.architecture, cluster.proxy)
        return proxy

    def _built(self, name_or_path: str, tokenizer: Any, *seeds: str | int) -> Any:
        config = self.here.config
        return build.build(
            name_or_path,
            len(tokenizer),
            generator(config.run.seed, "weights", *seeds),
            config.data.context_length,
            tokenizer.eos_token_id,
        ).to(config.run.device)

    def bridge(self, sequences: Packed) -> Bridge | None:
        """What compares base and proxies of another tokenizer, once all sequences are aligned."""
        config = self.here.config
        if config.distill.tokenizer_bridge != "shared" and self._bridge is None:
            self._bridge = Bridge(
                self.tokenizer,
                self.device_tokenizer,
                config.distill,
                config.run.kernels,
                len(sequences),
            )
            self._bridge.check(sequences.ids)
        return self._bridge

    def dense(self, state: Mapping[str, Tensor]) -> Any:
        """The base's architecture with another state."""
        model = self.saved("base")
        build.load_state(model, state)
        return model

    def mean_student(self, num_clusters: int) -> Any:
        """The plain mean of all students: what merging without experts would give."""
        states = [
            load_state(self.here.folder / self.student(index))[0] for index in range(num_clusters)
        ]
        return self.dense({name: mean_of([one[name] for one in states]) for name in states[0]})

    def upcycled(self, num_clusters: int, sequences: Packed, nearness_SK: Tensor) -> Any:
        """The mixture whose every expert is the base's feed-forward block."""
        config = self.here.config
        base = self.saved("base")
        return merge(
            [build.state_of(base)] * num_clusters,
            base.config,
            config.merge,
            config.run.seed,
            RouterText(sequences.ids, nearness_SK),
            config.run.kernels,
        )
