"""Refuses a caller's tensor in one wording: `op: argument must be what = wanted, got what`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def expect(
    tensor: Tensor,
    op: str,
    argument: str,
    shape: str,
    *,
    dtype: Iterable[torch.dtype] | torch.dtype = FLOATS,
    like: Tensor | None = None,
    **sizes: int,
) -> tuple[int, ...]:
    """Check a tensor against letters such as "T V"; return the sizes in order.

    Letters given as keywords must match; others are free. A leading "..." stands for any number of
    dimensions, which are not returned. `like` asks for the same device.

    Raises ValueError naming op, argument, wanted and got.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{op}: {argument} must be a tensor, got {type(tensor).__name__}")
    letters = shape.split()
    any_leading = bool(letters) and letters[0] == "..."
    letters = letters[1:] if any_leading else letters
    got = list(tensor.shape)
    rank_fits = len(got) >= len(letters) if any_leading else len(got) == len(letters)
    tail = got[len(got) - len(letters) :] if rank_fits else []
    fits = rank_fits and all(
        sizes.get(letter, size) == size for letter, size in zip(letters, tail, strict=True)
    )
    if not fits:
        names = (["..."] if any_leading else []) + letters
        wanted = ", ".join(names)
        values = ", ".join(str(sizes.get(name, name)) for name in names)
        equation = f"[{wanted}]" if wanted == values else f"[{wanted}] = [{values}]"
        raise ValueError(f"{op}: {argument} must be {equation}, got {got}")
    allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    if tensor.dtype not in allowed:
        wanted = ", ".join(map(_name, allowed))
        raise ValueError(f"{op}: {argument} must have dtype {wanted}, got {_name(tensor.dtype)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {argument} must be on {like.device}, got {tensor.device}")
    return tuple(tail)


def expect_option(value: object, op: str, argument: str, options: Iterable[object]) -> None:
    """Raises ValueError unless value is one of the options."""
    allowed = tuple(options)
    if value not in allowed:
        wanted = ", ".join(map(repr, allowed))
        raise ValueError(f"{op}: {argument} must be one of {wanted}, got {value!r}")


def expect_that(condition: bool, op: str, argument: str, wanted: str, got: object) -> None:
    """Raises ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {argument} must be {wanted}, got {got}")
