"""Other inputs for the cases of the distillation losses: spread, nearness of the teacher, mask.

logits of the student:  mean 0, standard deviation `std`
teacher "near":         the student's own, plus noise of a tenth of its spread
teacher "far":          independent of the student
masked:                 this share of the labels is -100
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deepfusion_kernels.cases import Case

NEAR = 0.1


def _spread(tensor: Tensor, std: float) -> Tensor:
    values = tensor.detach().float()
    return values * (std / values.std())


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)


def _logits(
    arguments: dict[str, Any], std: float | None, teacher: str | None, generator: torch.Generator
) -> dict[str, Any]:
    """Logits themselves: the student scaled, the teacher drawn anew where it is asked for."""
    old = arguments["student_logits"].detach()
    student = old.float() if std is None else _spread(old, std)
    # a copy: in float32 the teacher would else be made of what wants a gradient
    changed = {"student_logits": student.to(old.dtype, copy=True).requires_grad_()}
    if "teacher_logits" in arguments:
        noise = _spread(_normal(student, generator), float(student.std()))
        given = _spread(arguments["teacher_logits"], float(student.std()))
        choices = {"near": student + NEAR * noise, "far": noise, None: given}
        changed["teacher_logits"] = choices[teacher].to(old.dtype)
    elif teacher is not None:
        raise ValueError("--teacher needs an op that takes the teacher's logits or hidden states")
    return changed


def _hidden(
    arguments: dict[str, Any], std: float | None, teacher: str | None, generator: torch.Generator
) -> dict[str, Any]:
    """Hidden states and heads: a head's rows are scaled so that its logits have the spread."""
    changed: dict[str, Any] = {}
    for side in ("student", "teacher"):
        hidden, weight = arguments[f"{side}_hidden"], arguments[f"{side}_weight"]
        if weight is None:
            continue
        if std is not None:
            wide = std / math.sqrt(hidden.shape[1]) / hidden.detach().float().std()
            weight = _spread(weight, float(wide)).to(weight.dtype)
        changed |= {f"{side}_hidden": hidden.detach(), f"{side}_weight": weight.detach()}
    if teacher == "near" and "teacher_hidden" in changed:
        if changed["teacher_hidden"].shape != changed["student_hidden"].shape:
            raise ValueError("--teacher near needs hidden states of one width")
        hidden = changed["student_hidden"].float()
        noise = NEAR * hidden.std() * _normal(hidden, generator)
        changed["teacher_hidden"] = (hidden + noise).to(changed["student_hidden"].dtype)
        changed["teacher_weight"] = changed["student_weight"].clone()
    for name in ("student_hidden", "student_weight"):
        changed[name].requires_grad_(arguments[name].requires_grad)
    return changed


def varied(case: Case, std: float | None, teacher: str | None, masked: float | None) -> Case:
    """The same case on other inputs, named after them; unchanged where nothing is asked."""
    if std is None and teacher is None and masked is None:
        return case

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        arguments = case.make(device, dtype, seed)
        first = next(iter(arguments))
        if first not in ("student_logits", "student_hidden"):
            raise ValueError("--std, --teacher and --masked are for the distillation losses")
        # NOTE: of another seed than the case's own, or a far teacher would be the student again
        generator = torch.Generator().manual_seed(seed + 1_000_003)
        change = _logits if first == "student_logits" else _hidden
        arguments |= change(arguments, std, teacher, generator)
        if masked is not None:
            T = arguments[first].shape[0]
            labels = arguments.get("labels")
            if labels is None:
                labels = torch.zeros(T, dtype=torch.int64, device=device)
            hidden_rows = (torch.rand(T, generator=generator) < masked).to(device)
            arguments["labels"] = labels.masked_fill(hidden_rows, -100)
        return arguments

    words = [case.name]
    words += [] if std is None else [f"std{std:g}"]
    words += [] if teacher is None else [teacher]
    words += [] if masked is None else [f"masked{masked:g}"]
    return replace(case, name="-".join(words), make=make)
