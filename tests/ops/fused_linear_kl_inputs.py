"""Inputs, runs and the second spelling that the tests of the fused linear loss share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepfusion_kernels import fused_linear_kl_distillation, kl_distillation
from tests.budget import UNIT, assert_within_budget

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# one tile of everything; chunks of rows; slices of the vocabulary
CHUNKS = {"whole": 1 << 30, "rows": 128 * 8 * 61, "slices": 3000}
NAMES = ("student_hidden", "student_weight", "student_bias")


def inputs(
    T: int, V: int, dtype: torch.dtype = torch.float32, V_t: int | None = None
) -> dict[str, Any]:
    V_t = V if V_t is None else V_t
    shapes = {"student": (V, 12), "teacher": (V_t, 7)}
    arguments: dict[str, Any] = {}
    for side, (columns, D) in shapes.items():
        arguments[f"{side}_hidden"] = torch.randn(T, D)
        arguments[f"{side}_weight"] = torch.randn(columns, D) * (3 / D**0.5)
        arguments[f"{side}_bias"] = torch.randn(columns)
    arguments = {name: tensor.to(dtype) for name, tensor in arguments.items()}
    labels = torch.randint(V, (T,))
    labels[1::5] = -100
    weight = torch.rand(T) + 0.5
    weight[2::7] = 0
    return arguments | {"labels": labels, "row_weight": weight}


def run(
    arguments: dict[str, Any],
    backend: str,
    wants: tuple[str, ...] = NAMES,
    scale: float = 1.0,
    **options: Any,
) -> dict[str, Tensor]:
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in wants}
    loss = fused_linear_kl_distillation(**(arguments | leaves), backend=backend, **options)
    upstream = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape).to(loss.dtype) * scale
    if wants:
        loss.backward(upstream)
    return {"loss": loss.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def by_logits(arguments: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Logits whole in float32 or wider, then kl_distillation's reference."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in NAMES}
    both = arguments | leaves
    wide = torch.float64 if leaves["student_hidden"].dtype == torch.float64 else torch.float32
    keep = (both["labels"] != -100) & (both["row_weight"] != 0)
    student, teacher = (
        F.linear(
            both[f"{side}_hidden"].to(wide).masked_fill(~keep[:, None], 0),
            *(both[f"{side}_{part}"].to(wide) for part in ("weight", "bias")),
        )
        for side in ("student", "teacher")
    )
    rows = {name: both[name] for name in ("labels", "row_weight")}
    loss = kl_distillation(student, teacher, **rows, **options, backend="reference")
    upstream = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape).to(loss.dtype)
    loss.backward(upstream)
    return {"loss": loss.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def assert_all_within_budget(
    ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    for name, value in ours.items():
        wanted = truth[name].double()
        floor = UNIT[value.dtype] * wanted.abs().max() if wanted.numel() else 0.0
        if name == "loss":
            floor = 4e-6 * max(1.0, float(wanted.abs().max()))
        assert_within_budget(value, eager[name], wanted, name, floor)
