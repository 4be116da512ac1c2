"""What processes that train one model together must agree on; alone there is nothing to agree on.

server/shard.py has the real ones, for torchrun.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class Alone:
    """One process: every method does what a single process does anyway."""

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def wait(self) -> None:
        """Return once every process is here."""

    def part(self, rows_B: Tensor) -> Tensor:
        """This process's rows of a batch."""
        return rows_B

    def mean(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Terms of a loss, detached; the loss itself as its mean over the processes."""
        return {name: term.detach() for name, term in terms.items()}

    def shard(self, model: nn.Module) -> None:
        """Spread the model's layers over the processes."""

    def alike(self, parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Parameters in groups that one optimiser can hold: sharded ones apart."""
        found = list(parameters)
        return [found] if found else []

    def clip(self, parameters: Sequence[nn.Parameter], norm: float) -> None:
        """Mean gradients over the processes, then at most `norm` long."""
        nn.utils.clip_grad_norm_(parameters, norm)

    def gathered(self, tensor: Tensor) -> Tensor:
        """A sharded tensor whole."""
        return tensor

    def scattered(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A whole tensor sharded as `like`."""
        return tensor

    def held(self, tensor: Tensor) -> Tensor:
        """What this process holds of a tensor."""
        return tensor

    def spread(self, held: Tensor, like: Tensor) -> Tensor:
        """`held` of every process as one tensor sharded as `like`."""
        return held

    def whole(self, model: Any) -> Any:
        """The model as it was before `shard`, with what it has learned."""
        return model


ALONE = Alone()
