"""Shapes of the joined loss: odd ones for tests, the demo's, PAT's and the headline for timing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cases import Case, Make

DOOR = "view_aligned_attention"


def _lengths(B: int, T: int) -> Tensor:
    """From all tokens down to half of them; a few end inside a patch."""
    return torch.tensor([T - b * T // (2 * B) - b % 3 for b in range(B)])


def _make(
    B: int,
    T: int,
    J: int,
    H: int,
    M: int,
    D: int,
    heads: int,
    p: int,
    kind: str,
    causal: bool,
    padded: bool,
) -> Make:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        width = H * (p if kind == "conv" else 1)
        learns = {
            "patch_weight": normal(J, D, width, scale=width**-0.5),
            "patch_bias": normal(J, D, scale=0.1),
            "qkv_weight": normal(3 * D, D, scale=D**-0.5),
            "head_weight": normal(J, M, D, scale=D**-0.5),
            "head_bias": normal(J, M, scale=0.1),
        }
        return {
            "student_stages": [normal(B, T, H).requires_grad_() for _ in range(J)],
            "teacher_stages": [normal(B, T, M) for _ in range(J)],
            **{name: tensor.requires_grad_() for name, tensor in learns.items()},
            "num_heads": heads,
            "patch_size": p,
            "patchify": kind,
            "causal": causal,
            "attention_mask": (
                (torch.arange(T) < _lengths(B, T)[:, None]).to(device) if padded else None
            ),
        }

    return make


def _case(
    name: str,
    B: int,
    T: int,
    J: int,
    H: int,
    M: int,
    D: int,
    heads: int,
    p: int,
    kind: str,
    causal: bool = False,
    padded: bool = False,
) -> Case:
    width, weights = H * (p if kind == "conv" else 1), 3 * D * D + J * M * D
    weights += J * D * width
    lengths = _lengths(B, T).tolist() if padded else [T] * B
    patches = [-(-length // p) for length in lengths]
    rows = J * sum(patches)
    # half of the scores are seen, more or less
    scores = sum((J * Q) ** 2 for Q in patches) // (2 if causal else 1)
    tokens = J * (sum(lengths) * (H + M) + B * T * H)
    return Case(
        name=f"{name}-{kind}{'-causal' if causal else ''}{'-padded' if padded else ''}",
        door=DOOR,
        make=_make(B, T, J, H, M, D, heads, p, kind, causal, padded),
        # the student's stages in and out, the teacher's in, weights in and their gradients out
        bytes_moved=lambda itemsize: itemsize * (tokens + 2 * weights),
        flops=rows * (6 * D * width + 18 * D * D + 6 * D * M) + 14 * scores * D,
        quick=rows <= 64,
    )


_SIZES = (
    ("joined-demo", 8, 128, 4, 192, 128, 128, 4, 8),
    ("joined-pat", 8, 128, 4, 2048, 2048, 512, 8, 8),
    ("joined-headline", 8, 2048, 4, 2048, 2048, 512, 8, 8),
)
CASES: tuple[Case, ...] = (
    *(_case("joined-tiny", 2, 7, 3, 6, 5, 8, 2, 3, kind) for kind in ("conv", "pool")),
    *(
        _case(*sizes, kind, causal)
        for causal in (False, True)
        for kind in ("conv", "pool")
        for sizes in _SIZES
    ),
    *(_case(*sizes, kind, padded=True) for kind in ("conv", "pool") for sizes in _SIZES[:2]),
)
