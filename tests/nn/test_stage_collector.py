"""Stage features by hooks: which layers, checkpoints, and no trace afterwards."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepfusion_kernels.nn.stage_collector import StageCollector, stage_layers


class Layer(nn.Module):
    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.linear, self.as_tuple = nn.Linear(4, 4), as_tuple

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, None]:
        hidden = torch.tanh(self.linear(hidden))
        return (hidden, None) if self.as_tuple else hidden


class Model(nn.Module):
    def __init__(self, as_tuple: bool = False, reentrant: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(as_tuple) for _ in range(6))
        self.reentrant = reentrant

    def forward(self, hidden: Tensor) -> list[Tensor]:
        passed = []
        for layer in self.layers:
            if self.reentrant is None:
                hidden = layer(hidden)
            else:
                hidden = checkpoint(layer, hidden, use_reentrant=self.reentrant)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            passed.append(hidden)
        return passed


def test_cuts() -> None:
    assert stage_layers(6, 4) == [1, 2, 4, 5]
    assert stage_layers(4, 4) == [0, 1, 2, 3]
    assert stage_layers(7, 1) == [6]
    for stages in (0, 7):
        with pytest.raises(ValueError, match="num_stages"):
            stage_layers(6, stages)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_catches_the_layers_and_leaves_no_trace(as_tuple: bool) -> None:
    model = Model(as_tuple)
    with StageCollector(model.layers, 4) as stages:
        with pytest.raises(RuntimeError, match="0 of 4"):
            stages.tensors()
        for _ in range(2):
            passed = model(torch.randn(2, 3, 4))
            caught = stages.tensors()
            assert all(
                mine is passed[i] for mine, i in zip(caught, stage_layers(6, 4), strict=True)
            )
    assert not any(layer._forward_hooks for layer in model.layers)
    with pytest.raises(RuntimeError, match="0 of 4"):
        stages.tensors()


def test_gradients_are_the_same_under_checkpointing() -> None:
    model, hidden = Model(), torch.randn(2, 3, 4, requires_grad=True)
    grads = []
    for reentrant in (None, False):
        model.reentrant = reentrant
        with StageCollector(model.layers, 3) as stages:
            model(hidden)
            caught = stages.tensors()
            loss = sum(stage.square().sum() for stage in caught)
            grads.append(torch.autograd.grad(loss, [hidden, *model.parameters()]))
            # layers ran again in backward: what was caught stays
            assert all(map(lambda a, b: a is b, caught, stages.tensors()))
    torch.testing.assert_close(grads[0], grads[1])


def test_reentrant_checkpoints_and_strange_layers_are_refused() -> None:
    model = Model(reentrant=True)
    with (
        StageCollector(model.layers, 3),
        pytest.raises(RuntimeError, match="use_reentrant=False"),
    ):
        model(torch.randn(2, 3, 4, requires_grad=True))
    layers = nn.ModuleList([nn.Identity()])
    with StageCollector(layers, 1), pytest.raises(RuntimeError, match="must return a tensor"):
        layers[0]({"hidden": 1})
