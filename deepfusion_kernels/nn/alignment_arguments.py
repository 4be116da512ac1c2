"""What `view_aligned_attention` refuses, and which patches count."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..checks import INTEGERS, expect, expect_option, expect_that
from ..ops.shared import patches
from ..ops.shared.watched import is_watched
from ..ops.view_aligned_attention.loss_rows import checked_patches

OP = "view_aligned_attention"
MASKS = (torch.bool, *INTEGERS, torch.uint8)
P = ParamSpec("P")
R = TypeVar("R")


def _lowered(value: Any, dtype: torch.dtype) -> Any:
    """Float tensors in autocast's dtype; float64 stays, as with torch's own layers."""
    if isinstance(value, Tensor):
        lowers = value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if lowers else value
    if isinstance(value, list | tuple):
        return [_lowered(item, dtype) for item in value]
    return value


def autocast_door(door: Callable[P, R]) -> Callable[P, R]:
    """Lowers what a door is given where autocast is on, and turns it off inside.

    What a model computes under autocast meets parameters in float32: one dtype must hold for all.
    """

    @functools.wraps(door)
    def call(*args: P.args, **options: P.kwargs) -> R:
        stages: Any = options.get("student_stages", args[0] if args else None)
        kind = stages[0].device.type if stages else "cpu"
        if not torch.is_autocast_enabled(kind):
            return door(*args, **options)
        dtype = torch.get_autocast_dtype(kind)
        lowered: Any = [_lowered(value, dtype) for value in args]
        named: Any = {name: _lowered(value, dtype) for name, value in options.items()}
        with torch.autocast(kind, enabled=False):
            return door(*lowered, **named)

    return call


def _fits(tensor: Tensor, argument: str, letters: str, like: Tensor, **sizes: int) -> list[int]:
    """The sizes of a float tensor that shares dtype and device with `like`."""
    return list(expect(tensor, OP, argument, letters, dtype=like.dtype, like=like, **sizes))


def _is_mask(mask: Tensor, argument: str, like: Tensor, B: int, T: int) -> None:
    expect(mask, OP, argument, "B T", dtype=MASKS, like=like, B=B, T=T)


def _have_shapes(tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]], like: Tensor) -> bool:
    """The common answer without the words of a refusal, which cost more than the comparison."""
    dtype, device = like.dtype, like.device
    return all(
        isinstance(tensor, Tensor)
        and tensor.shape == shape
        and tensor.dtype == dtype
        and tensor.device == device
        for tensor, shape in zip(tensors, shapes, strict=True)
    )


def check_stages(student: Sequence[Tensor], teacher: Sequence[Tensor], has_offsets: bool) -> None:
    """Raises ValueError unless both sides have the same number of stages, each like the first."""
    expect_that(len(student) >= 1, OP, "student_stages", "at least one tensor", len(student))
    same = len(teacher) == len(student)
    expect_that(same, OP, "teacher_stages", f"{len(student)} tensors", len(teacher))
    B, T, H = expect(student[0], OP, "student_stages[0]", "B T H")
    fits = _have_shapes(student, [student[0].shape] * len(student), student[0])
    for j, stage in enumerate(() if fits else student):
        _fits(stage, f"student_stages[{j}]", "B T H", student[0], B=B, T=T, H=H)
    sizes = {"B": B} if has_offsets else {"B": B, "T": T}
    shapes = [getattr(teacher[0], "shape", ())] * len(teacher)
    fits = _have_shapes(teacher, shapes, student[0])
    for j, stage in enumerate(teacher[:1] if fits else teacher):
        name = f"teacher_stages[{j}]"
        _, sizes["T"], sizes["H"] = _fits(stage, name, "B T H", student[0], **sizes)
    for j, stage in enumerate(teacher):
        if stage.requires_grad:
            name = f"teacher_stages[{j}]"
            raise ValueError(f"{OP}: {name} must be without gradient: detach it, got one")


def check_weights(
    student: Tensor,
    teacher: Tensor,
    stages: int,
    patch_size: int,
    weights: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    num_heads: int,
) -> None:
    """Raises ValueError unless the five parameters fit the stages; patch_size 0 = pool."""
    patch_weight, patch_bias, qkv_weight, head_weight, head_bias = weights
    S, M = stages, teacher.shape[2]
    width = student.shape[2] * max(patch_size, 1)
    if isinstance(patch_bias, Tensor) and patch_bias.dim() == 2 and num_heads >= 1:
        D = patch_bias.shape[1]
        shapes = [(S, D, width), (S, D), (3 * D, D), (S, M, D), (S, M)]
        given = [weight for weight in weights if weight is not None]
        if D % num_heads == 0 and _have_shapes(given, shapes[: len(given)], student):
            return
    letters = "S D pH" if patch_size else "S D H"
    _, D, _ = _fits(patch_weight, "patch_weight", letters, student, S=S, pH=width, H=width)
    divides = num_heads >= 1 and D % num_heads == 0
    expect_that(divides, OP, "num_heads", f"a divisor of {D}", num_heads)
    _fits(patch_bias, "patch_bias", "S D", student, S=S, D=D)
    _fits(qkv_weight, "qkv_weight", "3D D", student, **{"3D": 3 * D, "D": D})
    _fits(head_weight, "head_weight", "S M D", student, S=S, M=M, D=D)
    if head_bias is not None:
        _fits(head_bias, "head_bias", "S M", student, S=S, M=M)


def check_embeddings(
    patch_embedding: Tensor | None, stage_embedding: Tensor | None, like: Tensor, Q: int
) -> None:
    """Raises ValueError unless the embeddings are [Q, D] and [S, D], S and D those of `like`."""
    S, D = like.shape
    if patch_embedding is not None:
        _fits(patch_embedding, "patch_embedding", "Q D", like, Q=Q, D=D)
    if stage_embedding is not None:
        _fits(stage_embedding, "stage_embedding", "S D", like, S=S, D=D)


def patch_tables(
    student: Tensor,
    teacher: Tensor,
    patch_size: int,
    attention_mask: Tensor | None,
    student_offsets: Tensor | None,
    teacher_offsets: Tensor | None,
    teacher_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Offsets of both sides [B, Q+1], even without tables, and the teacher's mask."""
    B, T = student.shape[:2]
    if attention_mask is not None:
        _is_mask(attention_mask, "attention_mask", student, B, T)
    if teacher_mask is not None:
        _is_mask(teacher_mask, "teacher_mask", student, B, teacher.shape[1])
    if student_offsets is None or teacher_offsets is None:
        expect_that(patch_size >= 1, OP, "patch_size", ">= 1", patch_size)
        # NOTE: on a GPU a first call within a graph's capture would keep what was never written
        is_kept = student.is_cpu and not is_watched((student, teacher))
        make = patches.kept_offsets if is_kept else patches.even_offsets
        offsets = make(B, T, patch_size, student.device)
        return offsets, offsets, attention_mask if teacher_mask is None else teacher_mask
    _, cuts = expect(
        student_offsets, OP, "student_offsets", "B Q+1", dtype=torch.int32, like=student, B=B
    )
    expect_that(cuts >= 1, OP, "student_offsets", "[B, Q+1] with Q >= 0", [B, cuts])
    expect(
        teacher_offsets, OP, "teacher_offsets", "B Q+1", dtype=torch.int32, like=student,
        **{"B": B, "Q+1": cuts},
    )  # fmt: skip
    return student_offsets, teacher_offsets, teacher_mask


def check_options(
    patchify: str, student_offsets: Tensor | None, teacher_offsets: Tensor | None
) -> bool:
    """Whether offsets are given; raises ValueError for one table alone, or tables with 'conv'."""
    expect_option(patchify, OP, "patchify", ("conv", "pool"))
    tables = [table is not None for table in (student_offsets, teacher_offsets)]
    expect_that(
        all(tables) == any(tables), OP, "teacher_offsets", "given with student_offsets", "one"
    )
    if any(tables):
        expect_that(patchify == "pool", OP, "patchify", "'pool' with offsets", repr(patchify))
    return any(tables)


def check_stage_weights(weights: Sequence[float], stages: int) -> None:
    """Raises ValueError unless there is one weight a stage."""
    expect_that(len(weights) == stages, OP, "stage_weights", f"{stages} floats", len(weights))


@torch.library.custom_op("deepfusion::valid_patches", mutates_args=())
def valid_patches(
    student_offsets: Tensor,
    teacher_offsets: Tensor,
    student_mask: Tensor | None,
    teacher_mask: Tensor | None,
    student_length: int,
    teacher_length: int,
) -> Tensor:
    """[B, Q] bool: the patch holds a valid token on both sides."""
    return checked_patches(
        student_offsets, teacher_offsets, student_mask, teacher_mask, student_length, teacher_length
    )[2]


@valid_patches.register_fake
def _(
    student_offsets: Tensor,
    teacher_offsets: Tensor,
    student_mask: Tensor | None,
    teacher_mask: Tensor | None,
    student_length: int,
    teacher_length: int,
) -> Tensor:
    B, cuts = student_offsets.shape
    return student_offsets.new_empty(B, cuts - 1, dtype=torch.bool)
