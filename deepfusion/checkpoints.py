"""A stage's output on disk, whole or not at all, and the way back into a stage that was killed.

done(stage, h)  <=>  stages/<stage>.json names inputs h, and every output is as it was written
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from . import files


class Saves(Protocol):
    """A model or tokenizer that writes itself into a folder."""

    def save_pretrained(self, save_directory: str, /) -> Any: ...


def save_model(folder: Path, model: Saves, tokenizer: Saves | None = None) -> None:
    """Write a model and its tokenizer as a folder for `from_pretrained`, whole or not at all."""
    with files.whole(folder) as partial:
        partial.mkdir()
        model.save_pretrained(str(partial))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))


def find_ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """name -> first name, in sorted order, of the same memory and shape; meta tensors will do."""
    first: dict[tuple[object, ...], str] = {}
    ties = {}
    for name in sorted(state):
        tensor = state[name]
        place = (
            tensor.untyped_storage()._cdata,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
        )
        if first.setdefault(place, name) != name:
            ties[name] = first[place]
    return ties


def save_state(
    path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
) -> None:
    """Write tensors and JSON facts as one safetensors file, tied tensors once. Raises DiskFull."""
    ties = find_ties(tensors)
    owned = {name: _own(tensor) for name, tensor in tensors.items() if name not in ties}
    header = {
        "facts": json.dumps(facts or {}, sort_keys=True),
        "ties": json.dumps(ties, sort_keys=True),
    }
    files.write_tensors(path, owned, header)


def _own(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own: safetensors refuses views that share one."""
    tensor = tensor.detach()
    shared = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone(memory_format=torch.contiguous_format) if shared else tensor


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of `save_state`; tied names share one tensor again."""
    with safe_open(path, framework="pt") as stream:
        header = stream.metadata() or {}
    tensors = load_file(path)
    for name, kept in json.loads(header.get("ties", "{}")).items():
        tensors[name] = tensors[kept]
    return tensors, json.loads(header.get("facts", "{}"))


class StageStore:
    """The finished stages of one run folder."""

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = run_folder

    def _record(self, stage: str) -> Path:
        return self.run_folder / "stages" / f"{stage}.json"

    def claim(self, config_text: str, config_hash: str) -> None:
        """Freeze the configuration into the run folder; ValueError if another one lives there."""
        frozen, text = self.run_folder / "config.json", self.run_folder / "config.toml"
        if frozen.exists():
            found = json.loads(frozen.read_text())["hash"]
            if found != config_hash:
                raise ValueError(
                    f"run folder {self.run_folder}: belongs to configuration {found[:12]}, "
                    f"this one is {config_hash[:12]}; set run.output to another folder, or "
                    "remove this one"
                )
        files.write_text(text, config_text)
        files.write_json(frozen, {"hash": config_hash})

    def done(self, stage: str, inputs_hash: str) -> bool:
        """Whether the stage ended on these inputs and its outputs are still whole."""
        record = self._record(stage)
        if not record.exists():
            return False
        facts = json.loads(record.read_text())
        return facts["inputs"] == inputs_hash and all(
            _is_whole(self.run_folder / name, one) for name, one in facts["outputs"].items()
        )

    def mark_done(
        self,
        stage: str,
        inputs_hash: str,
        outputs: Sequence[Path],
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Note that a stage ended; outputs lie inside the run folder, facts are small JSON."""
        paths = [path for output in outputs for path in _files_of(output)]
        known = {
            path.relative_to(self.run_folder).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": files.sha256_of(path),
            }
            for path in paths
        }
        record = {
            "stage": stage,
            "inputs": inputs_hash,
            "outputs": known,
            "facts": dict(facts or {}),
        }
        files.write_json(self._record(stage), record)

    def facts(self, stage: str) -> dict[str, Any]:
        """The small values a finished stage left behind."""
        facts: dict[str, Any] = json.loads(self._record(stage).read_text())["facts"]
        return facts

    def outputs_hash(self, stage: str) -> str:
        """A hash of a finished stage's outputs: the inputs' hash of the stage that reads them."""
        return sha256(self._record(stage).read_bytes()).hexdigest()


def _files_of(output: Path) -> list[Path]:
    if not output.exists():
        raise FileNotFoundError(f"{output}: a finished stage must have written it")
    return (
        sorted(path for path in output.rglob("*") if path.is_file())
        if output.is_dir()
        else [output]
    )


def _is_whole(path: Path, facts: Mapping[str, Any]) -> bool:
    return (
        path.is_file()
        and path.stat().st_size == facts["bytes"]
        and files.sha256_of(path) == facts["sha256"]
    )


class StepCheckpoint:
    """The state of a long stage every `every` steps: kill it, run again: the same bits."""

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every

    def due(self, step: int) -> bool:
        """Whether to save after `step` finished steps."""
        return self.every > 0 and step % self.every == 0

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
        save_state(
            self.path, tensors, {"step": step, "optimizers": scalars, "facts": dict(facts or {})}
        )

    def restore(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Sequence[Optimizer] = (),
        generators: Mapping[str, torch.Generator] | None = None,
    ) -> int:
        """Put everything back; return the number of finished steps, 0 where nothing was saved."""
        if not self.path.exists():
            return 0
        tensors, saved = load_state(self.path)
        for name, module in modules.items():
            prefix = f"module.{name}."
            module.load_state_dict(
                {
                    key.removeprefix(prefix): value
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
            )
        for index, (optimizer, kept) in enumerate(
            zip(optimizers, saved["optimizers"], strict=True)
        ):
            optimizer.load_state_dict(_join_optimizer(tensors, kept, f"optimizer.{index}"))
        for name, one in (generators or {}).items():
            one.set_state(tensors[f"rng.{name}"])
        torch.set_rng_state(tensors["rng"])
        return int(saved["step"])

    def facts(self) -> dict[str, Any]:
        """The facts of the last save; empty where nothing was saved."""
        if not self.path.exists():
            return {}
        facts: dict[str, Any] = load_state(self.path)[1]["facts"]
        return facts

    def remove(self) -> None:
        """Forget the checkpoint once the stage's output is on disk."""
        files.remove(self.path)


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
