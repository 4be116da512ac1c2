"""The fused linear loss at its edges: masked and bad rows, missing columns, shapes, bad input."""

import itertools
from typing import Any

import pytest
import torch

from deepfusion_kernels import fused_linear_kl_distillation
from tests.ops.fused_linear_kl_inputs import CHUNKS, inputs, run

STEM = "fused_linear_kl"


@pytest.mark.parametrize("chunks", CHUNKS)
def test_masked_rows_cannot_leak(chunks: str, backend: str, poisoned_memory: None) -> None:
    arguments = inputs(160, 61)
    masked = (arguments["labels"] == -100) | (arguments["row_weight"] == 0)
    clean = run(arguments, backend, chunk_bytes=CHUNKS[chunks], ce_weight=0.5)
    for poison in (torch.nan, torch.inf):
        for side in ("student_hidden", "teacher_hidden"):
            arguments[side] = arguments[side].masked_fill(masked[:, None], poison)
        found = run(arguments, backend, chunk_bytes=CHUNKS[chunks], ce_weight=0.5)
        for name, value in found.items():
            assert torch.equal(value, clean[name]), name
    arguments["labels"] = torch.full_like(arguments["labels"], -100)
    for name, value in run(arguments, backend, chunk_bytes=CHUNKS[chunks]).items():
        assert (value == 0).all(), name


@pytest.mark.parametrize("chunks", CHUNKS)
def test_infinite_bias_and_bad_rows_stay_where_they_are(chunks: str, backend: str) -> None:
    arguments = inputs(9, 50)
    arguments["labels"] = None
    arguments["row_weight"] = None
    arguments["student_hidden"][3] = torch.nan
    # the first slices are missing whole on both sides: inert
    arguments["student_bias"][:40] = arguments["teacher_bias"][:40] = -torch.inf
    options = {"reduction": "none", "backend": backend, "chunk_bytes": CHUNKS[chunks]}
    rows = fused_linear_kl_distillation(**arguments, **options)
    assert rows[3].isnan()
    assert rows[[0, 1, 2, 4, 5, 6, 7, 8]].isfinite().all()
    arguments["student_bias"][45] = -torch.inf
    rows = fused_linear_kl_distillation(**arguments, **options)
    assert (rows[4:] == torch.inf).all()


def test_shapes_at_the_edge(backend: str) -> None:
    arguments = inputs(6, 13) | {"labels": None, "row_weight": None}
    flat = run(arguments, backend, reduction="none")
    folded = {
        k: v.view(2, 3, -1) if "hidden" in k else v for k, v in arguments.items() if v is not None
    }
    found = run(folded, backend, reduction="none")
    assert found["loss"].shape == (2, 3)
    assert torch.equal(found["loss"].flatten(), flat["loss"])
    single = {k: v[0] if "hidden" in k else v for k, v in arguments.items() if v is not None}
    assert run(single, backend, reduction="none")["loss"].shape == ()
    empty = {k: v[:0] if "hidden" in k else v for k, v in arguments.items() if v is not None}
    for reduction, chunk_bytes in itertools.product(("mean", "none"), CHUNKS.values()):
        found = run(empty, backend, reduction=reduction, chunk_bytes=chunk_bytes)
        assert found["loss"].sum() == 0
        assert (found["dstudent_weight"] == 0).all()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"student_weight": torch.zeros(9, 5)}, r"student_weight must be \[V, D\] = \[V, 4\]"),
        ({"student_weight": torch.zeros(9, 4).half()}, "student_weight must have dtype float32"),
        ({"teacher_hidden": torch.zeros(2, 4)}, r"teacher_hidden must be \[..., D_t\] = \[3, 4\]"),
        ({"teacher_weight": torch.zeros(8, 4)}, "pass vocab_align='truncate'"),
        ({"teacher_weight": torch.zeros(9, 4, requires_grad=True)}, "teacher must be detached"),
        ({"teacher_weight": None}, "teacher_weight must be given when kd_weight != 0"),
        ({"student_bias": torch.zeros(3)}, "student_bias must be"),
        ({"kd_weight": 0.0}, "not both 0"),
        ({"ce_weight": 1.0}, "labels must be given"),
        ({"ce_weight": 1.0, "labels": torch.tensor([0, 9, 1])}, r"labels must be in .* = \[0, 9\)"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"chunk_bytes": 0}, "chunk_bytes must be positive"),
        ({"grad_weight_dtype": torch.int8}, "grad_weight_dtype must be one of"),
        ({"reduction": "batchmean"}, "reduction must be one of"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str, backend: str) -> None:
    arguments: dict[str, Any] = {
        "student_hidden": torch.zeros(3, 4),
        "student_weight": torch.zeros(9, 4),
        "teacher_hidden": torch.zeros(3, 4),
        "teacher_weight": torch.zeros(9, 4),
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_kl_distillation(**(arguments | change), backend=backend)
