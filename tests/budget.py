"""The error budget: every backend, forward and all gradients, against the reference in float64."""

import torch
from torch import Tensor

UNIT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def assert_within_budget(
    ours: Tensor, eager: Tensor, truth: Tensor, what: str, floor: Tensor | float | None = None
) -> None:
    """|ours - truth| <= 2 |eager - truth| + floor everywhere; truth = the reference in float64."""
    assert ours.shape == truth.shape, (
        f"{what}: shape {tuple(ours.shape)}, truth {tuple(truth.shape)}"
    )
    finite = truth.isfinite()
    assert torch.equal(ours.double()[~finite].nan_to_num(7.0), truth[~finite].nan_to_num(7.0)), (
        f"{what}: inf or NaN misplaced"
    )
    ours64, eager64, truth = ours.double()[finite], eager.double()[finite], truth[finite]
    if truth.numel() == 0:
        return
    floor = UNIT[ours.dtype] * truth.abs().max() if floor is None else floor
    excess = (ours64 - truth).abs() - 2 * (eager64 - truth).abs() - floor
    worst = int(excess.nan_to_num(nan=torch.inf).argmax())
    assert excess[worst] <= 0, (
        f"{what}[{worst}]: ours {ours64[worst]}, eager {eager64[worst]}, truth {truth[worst]}"
    )
