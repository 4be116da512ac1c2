"""Under torchrun: one mixture spread over several processes, each batch shared out among them.

layers            sharded by FSDP2: every process holds 1/W of each and gathers it when it is run
embeddings, head, final norm, views      whole in every process, their gradients averaged
loss              the mean over processes of the mean over their rows: all have equally many

The layers hold nearly all of a mixture, and what stands outside them is what our kernels are
called with directly: a sharded tensor must not reach them (docs/driver.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from ..models import build
from ..ranks import ALONE, Alone

# one process may work alone for hours while the others wait
PATIENCE = timedelta(days=7)


def ranks(device: str) -> Alone:
    """The processes that torchrun started, or this one alone.

    device: run.device; on "cuda" every process takes the GPU of its local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    kind = torch.device(device).type
    if not dist.is_initialized():
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    return Ranks(kind)


class Ranks(Alone):
    """The processes of one torchrun."""

    def __init__(self, kind: str) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(kind, (self.size,))
        self.kind = kind

    def wait(self) -> None:
        dist.barrier()

    def part(self, rows_B: Tensor) -> Tensor:
        """Every size-th row. Raises ValueError unless all processes get equally many."""
        if len(rows_B) % self.size:
            raise ValueError(
                f"shard: batch_size must be a multiple of the {self.size} processes, "
                f"got {len(rows_B)}"
            )
        return rows_B[self.rank :: self.size]

    def mean(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss as a mean; of its parts, which not all have, those of this process's rows."""
        loss = terms["loss"].detach() / self.size
        dist.all_reduce(loss)
        return {**{name: term.detach() for name, term in terms.items()}, "loss": loss}

    def shard(self, model: nn.Module) -> None:
        """In place; first all processes take the first one's weights."""
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
        for layer in build.layers(model):
            sharded = fully_shard(layer, mesh=self.mesh, reshard_after_forward=True)
            # gloo cannot average while it sums: divided afterwards instead
            sharded.set_force_sum_reduction_for_comms(self.kind == "cpu")

    def alike(self, parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
        found = list(parameters)
        sharded: list[nn.Parameter] = [one for one in found if isinstance(one, DTensor)]
        whole = [one for one in found if not isinstance(one, DTensor)]
        return [group for group in (sharded, whole) if group]

    def clip(self, parameters: Sequence[nn.Parameter], norm: float) -> None:
        """FSDP2 has averaged the sharded gradients; the whole ones are averaged here."""
        grads = [one.grad for one in parameters if isinstance(one.grad, DTensor)]
        sharded = [gradient.to_local() for gradient in grads]
        whole = self._averaged([one for one in parameters if not isinstance(one, DTensor)])
        squares = _squares(sharded, self.kind)
        dist.all_reduce(squares)
        length = (squares + _squares(whole, self.kind)).sqrt()
        factor = (norm / (length + 1e-6)).clamp(max=1.0)
        for gradient in (*sharded, *whole):
            gradient.mul_(factor)

    def _averaged(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Mean gradients of parameters that any process has one of: of a teacher's views only
        those have whose rows it taught."""
        has = torch.tensor([float(one.grad is not None) for one in parameters], device=self.kind)
        dist.all_reduce(has)
        found = []
        for parameter, somewhere in zip(parameters, has.tolist(), strict=True):
            if not somewhere:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.div_(self.size)
            dist.all_reduce(parameter.grad)
            found.append(parameter.grad)
        return found

    def gathered(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def scattered(self, tensor: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return tensor
        everywhere = DTensor.from_local(tensor, like.device_mesh, [Replicate()], run_check=False)
        return everywhere.redistribute(placements=like.placements)

    def held(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def spread(self, held: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor) or held.ndim == 0:
            return held
        return DTensor.from_local(
            held,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )

    def whole(self, model: Any) -> Any:
        """In the first process a model on the CPU with the gathered weights, elsewhere the same."""
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            full = self.gathered(tensor.detach())
            if self.first:
                state[name] = full.to("cpu", copy=True)
        if not self.first:
            return model
        made = build.from_config(model.config)
        build.load_state(made, state)
        return made


def _squares(gradients: Sequence[Tensor], kind: str) -> Tensor:
    """Sum of squares in float64, whatever the shards' sizes."""
    total = torch.zeros((), dtype=torch.float64, device=kind)
    for gradient in gradients:
        total += gradient.double().square().sum()
    return total
