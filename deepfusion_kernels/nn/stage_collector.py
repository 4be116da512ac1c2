"""The hidden states of a model at J evenly spaced cuts, caught as they pass.

stage j = what layer ceil(j L / J) puts out, j = 1 .. J
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def stage_layers(num_layers: int, num_stages: int) -> list[int]:
    """Indices from 0 of the layers after which the stages end.

    Raises ValueError unless 1 <= num_stages <= num_layers.
    """
    if not 1 <= num_stages <= num_layers:
        raise ValueError(
            f"StageCollector: num_stages must be in [1, {num_layers}], the layers; got {num_stages}"
        )
    return [-(-j * num_layers // num_stages) - 1 for j in range(1, num_stages + 1)]


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        return value[0]
    return None


class StageCollector:
    """Keeps the J stage features [B, T, D] of the latest forward pass of `layers`, graph included.

        with StageCollector(model.layers, 4) as stages:
            model(tokens)
            features = stages.tensors()

    A layer returns a tensor, or a tuple that begins with it. Checkpointed layers must be
    non-reentrant: a reentrant checkpoint runs them without a graph, which raises RuntimeError.
    `close()`, or leaving the block, takes every hook away and lets go of the features.
    """

    def __init__(self, layers: nn.ModuleList, num_stages: int) -> None:
        self._caught: list[Tensor | None] = [None] * num_stages
        self._handles: list[RemovableHandle] = []
        for stage, index in enumerate(stage_layers(len(layers), num_stages)):
            self._handles.append(self._watch(layers[index], stage))

    def _watch(self, layer: nn.Module, stage: int) -> RemovableHandle:
        def catch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            # a checkpoint runs its layers again during backward: those outputs are nobody's stages;
            # while a graph is traced nothing runs backward, and the question would break the graph
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                return
            hidden, entering = _first_tensor(output), _first_tensor(inputs)
            if hidden is None:
                raise RuntimeError(
                    f"StageCollector: layer {type(module).__name__} must return a tensor or a "
                    f"tuple that begins with one, got {type(output).__name__}"
                )
            if entering is not None and entering.requires_grad and not torch.is_grad_enabled():
                raise RuntimeError(
                    f"StageCollector: layer {type(module).__name__} must run with its graph, got a "
                    "reentrant checkpoint; pass use_reentrant=False"
                )
            self._caught[stage] = hidden

        return layer.register_forward_hook(catch)

    def tensors(self) -> list[Tensor]:
        """The J features of the latest forward pass; raises RuntimeError if there was none."""
        caught = [tensor for tensor in self._caught if tensor is not None]
        if len(caught) != len(self._caught):
            raise RuntimeError(
                f"StageCollector: {len(caught)} of {len(self._caught)} stages caught; run the "
                "model inside the block first"
            )
        return caught

    def close(self) -> None:
        """Takes the hooks away; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._caught = [None] * len(self._caught)

    def __enter__(self) -> StageCollector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
