"""The way back into a long stage that was killed between two steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import files
from .checkpoints import load_state, save_state
from .ranks import ALONE, Alone


class StepCheckpoint:
    """The state of a long stage every `every` steps: kill it, run again: the same bits.

    Several processes that train one model write what each holds, <name>.<step>.<rank>-of-<size>,
    and go back to the last step that all of them have written.
    """

    def __init__(self, path: Path, every: int, ranks: Alone = ALONE) -> None:
        self.path = path
        self.every = every
        self.ranks = ranks

    def due(self, step: int) -> bool:
        """Whether to save after `step` finished steps."""
        return self.every > 0 and step % self.every == 0

    def saved(self) -> Path | None:
        """This process's file of the last step that was saved whole; None: there is none."""
        if self.ranks.size == 1:
            return self.path if self.path.exists() else None
        steps = set.intersection(*(set(self._steps(rank)) for rank in range(self.ranks.size)))
        return self._of_rank(max(steps), self.ranks.rank) if steps else None

    def _of_rank(self, step: int | str, rank: int) -> Path:
        return self.path.with_suffix(f".{step}.{rank}-of-{self.ranks.size}{self.path.suffix}")

    def _steps(self, rank: int) -> dict[int, Path]:
        found = self.path.parent.glob(self._of_rank("*", rank).name)
        return {int(path.name.split(".")[-3]): path for path in found}

    def save(
        self,
        step: int,
        modules: Mapping[str, nn.Module],
        optimizers: Sequence[Optimizer] = (),
        generators: Mapping[str, torch.Generator] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write weights, optimizer states, random states and facts after `step` finished steps."""
        tensors = {f"rng.{name}": one.get_state() for name, one in (generators or {}).items()}
        tensors["rng"] = torch.get_rng_state()
        for name, module in modules.items():
            tensors |= {f"module.{name}.{key}": value for key, value in module.state_dict().items()}
        scalars = []
        for index, optimizer in enumerate(optimizers):
            moved, kept = _split_optimizer(optimizer, f"optimizer.{index}")
            tensors |= moved
            scalars.append(kept)
        held = {name: self.ranks.held(tensor) for name, tensor in tensors.items()}
        facts = {"step": step, "optimizers": scalars, "facts": dict(facts or {})}
        if self.ranks.size == 1:
            save_state(self.path, held, facts)
            return
        save_state(self._of_rank(step, self.ranks.rank), held, facts)
        # until everybody has this step, the one before is what a killed run goes back to
        self.ranks.wait()
        for other, path in self._steps(self.ranks.rank).items():
            if other != step:
                files.remove(path)

    def restore(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Sequence[Optimizer] = (),
        generators: Mapping[str, torch.Generator] | None = None,
    ) -> int:
        """Put everything back; return the number of finished steps, 0 where nothing was saved."""
        path = self.saved()
        if path is None:
            return 0
        tensors, saved = load_state(path)
        for name, module in modules.items():
            prefix = f"module.{name}."
            like = {prefix + key: value for key, value in module.state_dict().items()}
            module.load_state_dict(
                {
                    key.removeprefix(prefix): self.ranks.spread(tensors[key], like[key])
                    for key in tensors
                    if key.startswith(prefix)
                }
            )
        for index, (optimizer, kept) in enumerate(
            zip(optimizers, saved["optimizers"], strict=True)
        ):
            state = _join_optimizer(tensors, kept, f"optimizer.{index}")
            self._spread(state["state"], optimizer)
            optimizer.load_state_dict(state)
        for name, one in (generators or {}).items():
            one.set_state(tensors[f"rng.{name}"])
        torch.set_rng_state(tensors["rng"])
        return int(saved["step"])

    def _spread(self, state: dict[int, dict[str, Any]], optimizer: Optimizer) -> None:
        """What an optimiser keeps of a parameter is sharded as the parameter is."""
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        for number, values in state.items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    values[key] = self.ranks.spread(value, parameters[number])

    def facts(self) -> dict[str, Any]:
        """The facts of the last save; empty where nothing was saved."""
        path = self.saved()
        if path is None:
            return {}
        facts: dict[str, Any] = load_state(path)[1]["facts"]
        return facts

    def remove(self) -> None:
        """Forget the checkpoint once the stage's output is on disk."""
        own = self._steps(self.ranks.rank).values() if self.ranks.size > 1 else [self.path]
        for path in own:
            files.remove(path)


def _split_optimizer(optimizer: Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, values in state["state"].items():
        scalars[str(parameter)] = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}.{parameter}.{key}"] = value
            else:
                scalars[str(parameter)][key] = value
    return tensors, {"groups": state["param_groups"], "state": scalars}


def _join_optimizer(
    tensors: Mapping[str, Tensor], kept: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in kept["state"].items()
    }
    for name, value in tensors.items():
        if name.startswith(prefix + "."):
            index, key = name.removeprefix(prefix + ".").split(".", 1)
            state[int(index)][key] = value
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in kept["groups"]
    ]
    return {"state": state, "param_groups": groups}
