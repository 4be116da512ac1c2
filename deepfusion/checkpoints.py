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
from torch import Tensor

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
