"""Sharded experts under FSDP2 on two gloo processes: gradients are those of the whole batch."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from deepfusion_kernels import patching
from deepfusion_kernels.nn import MoELayer
from tests.tiny_moe import MODELS, build


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Any]:
    loss.backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def shard(model: nn.Module, mesh: Any, *inner: nn.Module) -> None:
    for module in (*inner, model):
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo sums, it does not average
            module.set_force_sum_reduction_for_comms(True)


def layer_and_loss() -> tuple[nn.Module, Any, Tensor]:
    """Tokens are routed alone, so that the mean of the shards is that of the whole batch."""
    layer = MoELayer(12, 20, 5, 2, shared_width=8, renormalize=True)
    return layer, lambda model, x: model(x)[0].square().mean(), torch.randn(4, 6, 12)


def patched_and_loss() -> tuple[nn.Module, Any, Tensor]:
    model = build("qwen3_moe", MODELS["qwen3_moe"])
    told = patching.enable(model)
    assert set(told.values()) == {"patched"}
    return model, lambda model, ids: model(ids).logits.square().mean(), torch.randint(3, 64, (4, 7))


def check_rank(rank: int, meeting_place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting_place}", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    mine = slice(2 * rank, 2 * rank + 2)
    for make in (layer_and_loss, patched_and_loss):
        torch.manual_seed(0)
        model, loss_of, batch = make()
        alone = copy.deepcopy(model)
        wanted = gradients(alone, loss_of(alone, batch))
        experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
        # MoELayer reads the matrices of its experts itself: they belong to its own group
        shard(model, mesh, *(experts if make is patched_and_loss else ()))
        found = gradients(model, loss_of(model, batch[mine]))
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            if "experts" in name:
                assert gradient.to_local().numel() < wanted[name].numel()
            torch.testing.assert_close(gradient.full_tensor(), wanted[name], rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_gradients_are_the_whole_batch_s(tmp_path: Path) -> None:
    mp.spawn(check_rank, (str(tmp_path / "meeting"),), nprocs=2)
