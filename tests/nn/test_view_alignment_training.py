"""The module in training: autocast, checkpoints, full graphs, FSDP2 on two gloo processes."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from deepfusion_kernels import view_aligned_attention
from deepfusion_kernels.nn import ViewAlignedAttention
from tests.nn.alignment_spelling import draw
from tests.nn.alignment_variants import PARAMETERS

H, M, J = 12, 10, 2


class TinyStudent(nn.Module):
    """J layers whose outputs are the stages; all computed again in backward if asked."""

    def __init__(self, recomputes: bool = False, patchify: str = "conv") -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(J))
        for layer in self.layers:
            nn.init.uniform_(layer.weight, -0.5, 0.5, generator=draws)
            nn.init.zeros_(layer.bias)
        self.views = ViewAlignedAttention(H, M, J, 16, 2, 4, patchify, generator=draws)
        self.recomputes = recomputes

    def forward(self, hidden: Tensor, *teacher: Tensor) -> Tensor:
        stages = []
        for layer in self.layers:
            if self.recomputes:
                hidden = torch.tanh(checkpoint(layer, hidden, use_reentrant=False))
            else:
                hidden = torch.tanh(layer(hidden))
            stages.append(hidden)
        if self.recomputes:
            loss: Tensor = checkpoint(self.views, stages, list(teacher), use_reentrant=False)
        else:
            loss = self.views(stages, list(teacher))
        return loss


def batch() -> tuple[Tensor, ...]:
    draws = torch.Generator().manual_seed(1)
    return tuple(torch.randn(4, 12, width, generator=draws) for width in (H, *[M] * J))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("patchify", ["conv", "pool"])
def test_checkpoints_give_the_same_gradients(patchify: str) -> None:
    model = TinyStudent(patchify=patchify)
    wanted = gradients(model, model(*batch()))
    model.recomputes = True
    found = gradients(model, model(*batch()))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_autocast_lowers_stages_and_parameters_alike() -> None:
    given = draw(torch.float32)
    lowered = {
        name: [t.bfloat16() for t in value] if isinstance(value, list) else value
        for name, value in given.items()
    }
    lowered |= {name: given[name].bfloat16() for name in PARAMETERS}
    wanted = view_aligned_attention(**lowered)
    leaves = [given[name].requires_grad_() for name in PARAMETERS]
    with torch.autocast("cpu", torch.bfloat16):
        loss = view_aligned_attention(**given)
        mixed = view_aligned_attention(**given | {"student_stages": lowered["student_stages"]})
    assert torch.equal(loss, wanted)
    assert torch.equal(mixed, wanted)
    assert loss.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(loss, leaves))
    with pytest.raises(ValueError, match="dtype"):
        view_aligned_attention(**given | {"student_stages": lowered["student_stages"]})


def test_a_student_trains_under_autocast() -> None:
    model = TinyStudent()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch())
    torch.testing.assert_close(loss, model(*batch()), rtol=0.02, atol=0)
    assert all(grad.isfinite().all() for grad in gradients(model, loss).values())


@pytest.mark.parametrize("is_autocast", [False, True])
def test_module_compiles_whole(is_autocast: bool) -> None:
    torch._dynamo.reset()
    model = TinyStudent()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        wanted, found = model(*batch()), compiled(*batch())
    torch.testing.assert_close(found, wanted)
    expected = gradients(model, wanted)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, expected[name])


def check_rank(rank: int, meeting_place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting_place}", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    hidden, *teacher = batch()
    mine = slice(2 * rank, 2 * rank + 2)
    for recomputes in (False, True):
        model = TinyStudent(recomputes)
        alone = copy.deepcopy(model)
        wanted = gradients(alone, alone(hidden, *teacher))
        fully_shard(model.views, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # gloo sums, it does not average
                module.set_force_sum_reduction_for_comms(True)
        loss = model(hidden[mine], *(target[mine] for target in teacher))
        for name, gradient in gradients(model, loss).items():
            torch.testing.assert_close(gradient.full_tensor(), wanted[name])
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_gradients_are_the_whole_batch_s(tmp_path: Path) -> None:
    mp.spawn(check_rank, (str(tmp_path / "meeting"),), nprocs=2)
