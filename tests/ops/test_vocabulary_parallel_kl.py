"""The vocabulary-parallel loss on 2 and 4 gloo processes against the whole loss in float64."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from deepfusion_kernels import fused_linear_kl_distillation
from deepfusion_kernels.ops.fused_linear_kl.vocabulary_parallel import (
    vocabulary_parallel_kl_distillation,
)
from tests.budget import UNIT, assert_within_budget

T, V, D_S, D_T = 21, 94, 12, 7
MIXES = (
    {"divergence": "forward_kl", "ce_weight": 0.5, "temperature": 2.0},
    {"divergence": "forward_kl", "ce_weight": 0.5, "kd_weight": 0.7},
    {"divergence": "reverse_kl", "temperature": 0.5},
    {"divergence": "jsd", "beta": 0.3, "ce_weight": 1.0},
    {"kd_weight": 0.0, "ce_weight": 1.0},
)


def arguments_of(dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"student": (D_S, 10.0), "teacher": (D_T, 3.0)}
    made: dict[str, Any] = {}
    for side, (D, spread) in shapes.items():
        made[f"{side}_hidden"] = torch.randn(T, D, generator=generator)
        made[f"{side}_weight"] = torch.randn(V, D, generator=generator) * (spread / D**0.5)
    made = {name: tensor.to(torch.bfloat16).to(dtype) for name, tensor in made.items()}
    labels = torch.randint(V, (T,), generator=generator)
    labels[3] = -100
    return made | {"labels": labels, "row_weight": torch.rand(T, generator=generator)}


def step(loss: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    wanted = [arguments["student_hidden"], arguments["student_weight"]]
    upstream = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream)]


def whole(dtype: torch.dtype, **options: Any) -> list[Tensor]:
    arguments = arguments_of(dtype)
    for name in ("student_hidden", "student_weight"):
        arguments[name].requires_grad_()
    return step(
        fused_linear_kl_distillation(**arguments, **options, backend="reference"), arguments
    )


def check_rank(rank: int, num_ranks: int, meeting_place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting_place}", rank=rank, world_size=num_ranks)
    # shards of unequal size; the last one of four is a single column
    cuts = {2: (0, 40, V), 4: (0, 40, 41, 93, V)}[num_ranks]
    mine = slice(cuts[rank], cuts[rank + 1])
    for dtype, mix, reduction in itertools.product(
        (torch.float32, torch.bfloat16), MIXES, ("mean", "none")
    ):
        arguments = arguments_of(dtype)
        for side in ("student", "teacher"):
            arguments[f"{side}_weight"] = arguments[f"{side}_weight"][mine].clone()
        for name in ("student_hidden", "student_weight"):
            arguments[name].requires_grad_()
        options: dict[str, Any] = mix | {"reduction": reduction}
        loss = vocabulary_parallel_kl_distillation(
            **arguments, first_column=mine.start, num_columns=V, chunk_bytes=2000, **options
        )
        ours, eager, truth = (
            step(loss, arguments),
            whole(dtype, **options),
            whole(torch.float64, **options),
        )
        for what, value, near, wanted in zip(
            ("loss", "dhidden", "dweight"), ours, eager, truth, strict=True
        ):
            # floors of the whole: a shard has its part of one gradient
            largest = float(wanted.abs().max())
            floor = 4e-6 * max(1.0, largest) if what == "loss" else UNIT[value.dtype] * largest
            if what == "dweight":
                near, wanted = near[mine], wanted[mine]
            assert_within_budget(value, near, wanted, f"{what} {options} {dtype}", floor)
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shards_equal_the_whole(num_ranks: int, tmp_path: Path) -> None:
    mp.spawn(check_rank, (num_ranks, str(tmp_path / "meeting")), nprocs=num_ranks)


def test_a_shard_beyond_the_vocabulary_is_refused() -> None:
    arguments = arguments_of(torch.float32)
    with pytest.raises(ValueError, match=r"student_weight must be a shard .* got 93"):
        vocabulary_parallel_kl_distillation(**arguments, first_column=0, num_columns=93)
    arguments["labels"][0] = V
    with pytest.raises(ValueError, match="labels must be in"):
        vocabulary_parallel_kl_distillation(
            **arguments, first_column=0, num_columns=V, ce_weight=1.0
        )
