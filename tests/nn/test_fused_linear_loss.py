"""The module that owns the lm_head: tied embeddings, checkpointing, FSDP2 on two gloo processes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from deepfusion_kernels import fused_linear_kl_distillation
from deepfusion_kernels.nn import FusedLinearKLDistillationLoss

V, D, D_T = 61, 12, 7


class TinyModel(nn.Module):
    """Embedding, one layer, loss; layer and loss are computed again in backward if asked."""

    def __init__(self, is_tied: bool, recomputes: bool, **options: Any) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(V, D), nn.Linear(D, D)
        head = nn.Linear(D, V, bias=not is_tied)
        if is_tied:
            head.weight = self.embedding.weight
        self.loss = FusedLinearKLDistillationLoss(lm_head=head, ce_weight=0.5, **options)
        self.recomputes = recomputes

    def forward(self, ids: Tensor, *teacher: Tensor) -> Tensor:
        if self.recomputes:
            hidden = checkpoint(self.layer, self.embedding(ids[:, :-1]), use_reentrant=False)
            rest = (hidden, None, *teacher, ids[:, 1:])
            return checkpoint(self.loss, *rest, use_reentrant=False)
        hidden = self.layer(self.embedding(ids[:, :-1]))
        loss: Tensor = self.loss(hidden, None, *teacher, ids[:, 1:])
        return loss


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (4, 10), generator=generator)
    teacher_hidden = torch.randn(4, 9, D_T, generator=generator)
    return ids, teacher_hidden, torch.randn(V, D_T, generator=generator)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
def test_owned_head_gives_the_gradients_of_logits(is_tied: bool, recomputes: bool) -> None:
    model, (ids, *teacher) = TinyModel(is_tied, recomputes), batch()
    found = gradients(model, loss := model(ids, *teacher))
    model.zero_grad()
    head = model.loss.lm_head
    hidden = model.layer(model.embedding(ids[:, :-1]))
    ln_q = head(hidden).log_softmax(-1)
    ln_p = (teacher[0] @ teacher[1].T).log_softmax(-1)
    kd = nn.functional.kl_div(ln_q, ln_p, log_target=True, reduction="none").sum(-1).mean()
    ce = nn.functional.nll_loss(ln_q.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, kd + 0.5 * ce)
    for name, wanted in gradients(model, kd + 0.5 * ce).items():
        torch.testing.assert_close(found[name], wanted)


def test_a_head_is_given_once() -> None:
    hidden, weight = torch.randn(3, D), torch.randn(V, D)
    labels = torch.tensor([0, 5, 60])
    options = {"kd_weight": 0.0, "ce_weight": 1.0}
    owner = FusedLinearKLDistillationLoss(lm_head=nn.Linear(D, V), **options)
    wanted = fused_linear_kl_distillation(
        hidden, owner.lm_head.weight, None, None, labels, student_bias=owner.lm_head.bias, **options
    )
    assert torch.equal(owner(hidden, None, None, None, labels), wanted)
    with pytest.raises(ValueError, match="student_weight must be None"):
        owner(hidden, weight, None, None, labels)
    with pytest.raises(ValueError, match="student_weight must be given without lm_head"):
        FusedLinearKLDistillationLoss(**options)(hidden, None, None, None, labels)


def check_rank(rank: int, meeting_place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting_place}", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    ids, teacher_hidden, teacher_weight = batch()
    mine = slice(2 * rank, 2 * rank + 2)
    for is_tied, recomputes, chunk_bytes in (
        (True, True, None), (False, True, None), (False, False, 3000), (True, False, None),
    ):  # fmt: skip
        torch.manual_seed(0)
        model = TinyModel(is_tied, recomputes, chunk_bytes=chunk_bytes)
        alone = copy.deepcopy(model)
        wanted = gradients(alone, alone(ids, teacher_hidden, teacher_weight))
        # a tied weight belongs to the group that also holds the embedding
        if not is_tied:
            fully_shard(model.loss, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # gloo sums, it does not average
                module.set_force_sum_reduction_for_comms(True)
        loss = model(ids[mine], teacher_hidden[mine], teacher_weight)
        for name, gradient in gradients(model, loss).items():
            torch.testing.assert_close(gradient.full_tensor(), wanted[name])
    lone = FusedLinearKLDistillationLoss(lm_head=nn.Linear(D, V), kd_weight=0.0, ce_weight=1.0)
    fully_shard(lone.lm_head, mesh=mesh)
    with pytest.raises(ValueError, match="fully_shard this module or one around it"):
        lone(torch.randn(9, D), None, None, None, ids[0, 1:])
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_gradients_are_the_whole_batch_s(tmp_path: Path) -> None:
    mp.spawn(check_rank, (str(tmp_path / "meeting"),), nprocs=2)
