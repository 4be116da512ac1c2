"""Stage features of a transformers model: what it would list itself, graphs, memory, no trace."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepfusion_kernels.nn.stage_collector import StageCollector, stage_layers

transformers = pytest.importorskip("transformers")
LAYERS = 5


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def tokens() -> Tensor:
    return torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(2))


def hooks(model: nn.Module) -> list[int]:
    """How many hooks every module has."""
    return [
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    ]


def collected(model: Any, call: Any, stages: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Stages of a call and the gradients of their squares."""
    with StageCollector(model.model.layers, stages) as collector:
        logits = call(tokens()).logits
        caught = collector.tensors()
        loss = logits.square().mean() + torch.stack([s.square().mean() for s in caught]).sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
    return [stage.detach() for stage in caught], list(grads)


def test_stages_are_the_models_own_hidden_states() -> None:
    model = llama()
    caught, _ = collected(model, model)
    listed = llama()(tokens(), output_hidden_states=True).hidden_states
    for stage, layer in zip(caught, stage_layers(LAYERS, 3), strict=True):
        # the last one listed has passed the final norm
        mine = model.model.norm(stage) if layer == LAYERS - 1 else stage
        torch.testing.assert_close(mine, listed[layer + 1])


def test_removal_leaves_no_trace() -> None:
    model = llama()
    before, names, logits = hooks(model), set(model.state_dict()), model(tokens()).logits
    collected(model, model)
    assert hooks(model) == before
    assert set(model.state_dict()) == names
    assert torch.equal(model(tokens()).logits, logits)


def test_only_the_stages_are_kept() -> None:
    """Without a graph the outputs of other layers die as the model goes on."""
    model, outputs = llama(), []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, __, output: outputs.append(
                weakref.ref(output[0] if isinstance(output, tuple) else output)
            )
        )
    with torch.no_grad(), StageCollector(model.model.layers, 2) as stages:
        model(tokens())
        alive = [output() is not None for output in outputs]
        assert alive == [layer in stage_layers(LAYERS, 2) for layer in range(LAYERS)]
        assert len(stages.tensors()) == 2
    assert not any(output() is not None for output in outputs)


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, model = llama(), llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for wanted, found in zip(collected(plain, plain), collected(model, model), strict=True):
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_models_are_collected_from(fullgraph: bool) -> None:
    torch._dynamo.reset()
    plain, model = llama(), llama()
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    for wanted, found in zip(collected(plain, plain), collected(model, compiled), strict=True):
        torch.testing.assert_close(found, wanted)
    # one that is opened again catches, and one that is closed is let go
    with StageCollector(model.model.layers, 2) as stages:
        compiled(tokens())
        assert len(stages.tensors()) == 2
    compiled(tokens())
    with pytest.raises(RuntimeError, match="0 of 2"):
        stages.tensors()
