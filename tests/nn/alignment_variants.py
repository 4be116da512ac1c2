"""Calls of the joined loss by name: cuts, masks, options, and their loss with all gradients."""

from typing import Any

import torch
from torch import Tensor

from tests.nn.alignment_spelling import draw

PARAMETERS = ("patch_weight", "patch_bias", "qkv_weight", "head_weight", "head_bias")
EMBEDDINGS = ("patch_embedding", "stage_embedding")


def left_padding(B: int, T: int) -> Tensor:
    return torch.arange(T) >= torch.tensor([0, *[T // 2 + 1] * (B - 1)])[:, None]


def holes(B: int, T: int) -> Tensor:
    mask = torch.rand(B, T) > 0.4
    mask[0, 4:8] = False
    return mask


def tables(B: int, T: int, Q: int = 5) -> dict[str, Tensor]:
    """Random spans on both sides, empty ones and a last offset below T among them."""
    cuts = torch.randint(0, T, (2, B, Q + 1)).sort(dim=2).values.int()
    cuts[0, 0, 1] = cuts[0, 0, 2]
    return {"student_offsets": cuts[0], "teacher_offsets": cuts[1]}


VARIANTS: dict[str, dict[str, Any]] = {
    "conv": {},
    "conv-causal-left": {"causal": True, "mask": left_padding},
    "conv-holes-norm": {"mask": holes, "target_norm": True},
    "pool": {"patchify": "pool"},
    "pool-causal-holes": {"patchify": "pool", "causal": True, "mask": holes},
    "offsets": {"patchify": "pool", "tables": True, "target_norm": True},
    "offsets-mask": {"patchify": "pool", "tables": True, "mask": holes, "teacher_mask": True},
}


def arguments(variant: str, dtype: torch.dtype, **sizes: int) -> dict[str, Any]:
    options = dict(VARIANTS[variant])
    given = draw(dtype, patchify=options.pop("patchify", "conv"), **sizes)
    B, T = given["student_stages"][0].shape[:2]
    if "mask" in options:
        given["attention_mask"] = options.pop("mask")(B, T)
    if options.pop("tables", False):
        given.update(tables(B, T))
    if options.pop("teacher_mask", False):
        given["teacher_mask"] = holes(B, T).int()
    return given | options


def embed(given: dict[str, Any]) -> dict[str, Any]:
    """Adds both embeddings."""
    J, D = given["patch_bias"].shape
    T, p = given["student_stages"][0].shape[1], given["patch_size"]
    Q = given["student_offsets"].shape[1] - 1 if "student_offsets" in given else -(-T // p)
    dtype = given["patch_bias"].dtype
    return given | {
        "patch_embedding": (0.3 * torch.randn(Q, D)).to(dtype),
        "stage_embedding": (0.3 * torch.randn(J, D)).to(dtype),
    }


def leaves(given: dict[str, Any]) -> list[Tensor]:
    named = [given[name] for name in (*PARAMETERS, *EMBEDDINGS) if given.get(name) is not None]
    return [*given["student_stages"], *named]


def run(function: Any, given: dict[str, Any], **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss and the gradients of everything that has one."""
    fresh = {
        name: [t.detach().clone() for t in value] if name == "student_stages" else value
        for name, value in given.items()
    }
    for name in (*PARAMETERS, *EMBEDDINGS):
        if fresh.get(name) is not None:
            fresh[name] = fresh[name].detach().clone()
    for leaf in leaves(fresh):
        leaf.requires_grad_()
    loss = function(**fresh, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return loss.detach(), list(torch.autograd.grad(loss, leaves(fresh)))


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(item) for item in value]
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: one(value) for name, value in given.items()}
