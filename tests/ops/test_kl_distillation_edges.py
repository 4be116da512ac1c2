"""kl_distillation, every row of docs/ops/kl_distillation.md's table of errors and edges."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import kl_distillation

STEM = "kl_distillation"
INF = math.inf
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def sides(device: torch.device, T: int = 4, V: int = 40) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(T, V) * 3, torch.randn(T, V) * 3
    return student.to(device).requires_grad_(), teacher.to(device)


def spoil(logits: Tensor, where: tuple[Any, ...], value: float) -> Tensor:
    changed = logits.detach().clone()
    changed[where] = value
    return changed.requires_grad_(logits.requires_grad)


def rows_and_gradient(
    student: Tensor, teacher: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    rows = kl_distillation(student, teacher, reduction="none", **options)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    return rows.detach(), gradient


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"divergence": "kl"},
            "divergence must be one of 'forward_kl', 'reverse_kl', 'jsd', got 'kl'",
        ),
        ({"temperature": 0.0}, "temperature must be finite and >= 1e-6, got 0.0"),
        ({"temperature": math.nan}, "temperature must be finite and >= 1e-6, got nan"),
        ({"temperature": INF}, "temperature must be finite and >= 1e-6, got inf"),
        ({"beta": 1.1}, "beta must be in [0, 1], got 1.1"),
        ({"kd_weight": INF}, "kd_weight must be finite, got inf"),
        ({"kd_weight": 0.0}, "kd_weight and ce_weight must be not both 0, got 0 and 0"),
        ({"ce_weight": 1.0}, "labels must be given when ce_weight != 0, got None"),
        ({"reduction": "batchmean"}, "reduction must be one of 'mean', 'sum', 'none'"),
        ({"vocab_align": "pad"}, "vocab_align must be one of 'error', 'truncate', got 'pad'"),
        ({"teacher_logits": None}, "teacher_logits must be given when kd_weight != 0, got None"),
        (
            {"teacher_logits": torch.zeros(4, 39)},
            "teacher_logits must be [..., V] = [4, 40], got [4, 39]; pass vocab_align='truncate'",
        ),
        ({"teacher_logits": torch.zeros(3, 40)}, "must be [..., V] = [4, 40], got [3, 40]"),
        (
            {"teacher_logits": torch.zeros(4, 40).int()},
            "must have dtype float32, bfloat16, float16",
        ),
        ({"student_logits": torch.tensor(1.0)}, "student_logits must be [..., V], got []"),
        ({"student_logits": torch.zeros(4, 0)}, "must be [..., V] with V >= 1, got [4, 0]"),
        ({"labels": torch.zeros(3).long()}, "labels must be [4], got [3]"),
        ({"labels": torch.zeros(4)}, "labels must have dtype int64, int32, got float32"),
        ({"row_weight": torch.ones(4, 1)}, "row_weight must be [4], got [4, 1]"),
        ({"row_weight": torch.ones(4, requires_grad=True)}, "row_weight must be without gradient"),
        ({"backend": "tpu"}, "backend must be None or one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals_name_op_argument_wanted_and_got(changed: dict[str, Any], message: str) -> None:
    arguments = {"student_logits": torch.zeros(4, 40), "teacher_logits": torch.zeros(4, 40)}
    with pytest.raises(ValueError, match=re.escape(message)):
        kl_distillation(**(arguments | changed))


def test_labels_out_of_range_are_refused_on_the_cpu_unless_masked(
    backend: str, device: torch.device
) -> None:
    student, teacher = sides(device)
    labels = torch.tensor([0, 40, -7, -100], device=device)
    options: dict[str, Any] = {"ce_weight": 0.5, "backend": backend}
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"labels must be in \[0, V_s\) = .* got 40 in row 1"):
            kl_distillation(student, teacher, labels, **options)
    else:
        rows, gradient = rows_and_gradient(student, teacher, labels=labels, **options)
        assert rows.isnan().tolist() == [False, True, True, False]
        assert gradient.isnan().all(-1).tolist() == [False, True, True, False]
    keep = torch.tensor([1.0, 0.0, 0.0, 1.0], device=device)
    assert kl_distillation(student, teacher, labels, row_weight=keep, **options).isfinite()
    # for the mask alone a label is never looked up
    assert kl_distillation(student, teacher, labels, backend=backend).isfinite()


def test_no_rows_and_one_column(backend: str, device: torch.device) -> None:
    for shape in ((0, 33), (2, 0, 33), (0, 2, 3, 33)):
        student = torch.zeros(shape, device=device, requires_grad=True)
        loss = kl_distillation(student, torch.zeros(shape, device=device), backend=backend)
        assert loss == 0
        assert torch.autograd.grad(loss, student)[0].shape == shape
    student, teacher = sides(device, 3, 1)
    rows, gradient = rows_and_gradient(student, teacher, backend=backend)
    assert rows.tolist() == [0, 0, 0]
    assert not gradient.any()


def test_masked_rows_are_never_read(
    backend: str, device: torch.device, poisoned_memory: None
) -> None:
    student, teacher = sides(device, V=4200)
    student, teacher = spoil(student, (1,), math.nan), spoil(teacher, (1,), INF)
    labels = torch.tensor([3, -100, 5, 7], device=device)
    options: dict[str, Any] = {"ce_weight": 0.5, "backend": backend, "temperature": 2.0}
    rows, gradient = rows_and_gradient(student, teacher, labels=labels, **options)
    assert rows[1] == 0
    assert not gradient[1].any()
    assert rows.isfinite().all()
    assert gradient.isfinite().all()
    masked = torch.full_like(labels, -100)
    loss = kl_distillation(student, teacher, masked, **options)
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("missing", [-INF, torch.finfo(torch.float32).min, -1e30])
def test_columns_missing_on_both_sides_are_inert(
    backend: str, device: torch.device, divergence: str, missing: float
) -> None:
    """A whole first block of them, and single ones: as if the columns were not there."""
    student, teacher = sides(device, 3, 4200)
    present = torch.arange(4096, 4200)[::2]
    gone = torch.ones(4200, dtype=torch.bool)
    gone[present] = False
    spoilt = [spoil(side, (slice(None), gone.to(device)), missing) for side in (student, teacher)]
    options: dict[str, Any] = {"divergence": divergence, "backend": backend, "temperature": 0.5}
    rows, gradient = rows_and_gradient(*spoilt, **options)
    small = [side.detach()[:, present.to(device)] for side in (student, teacher)]
    wanted, of_present = rows_and_gradient(small[0].requires_grad_(), small[1], **options)
    torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[:, present], of_present, rtol=1e-4, atol=1e-5)
    assert not gradient[:, gone].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("temperature", [1.0, 1e-6])
def test_columns_missing_on_one_side(
    backend: str, device: torch.device, divergence: str, side: str, temperature: float
) -> None:
    student, teacher = sides(device, V=4200)
    where = (2, slice(5, 9))
    spoilt = student if side == "student" else teacher
    spoilt = spoil(spoilt, where, -INF)
    pair = (spoilt, teacher) if side == "student" else (student, spoilt)
    rows, gradient = rows_and_gradient(
        *pair, divergence=divergence, backend=backend, temperature=temperature
    )
    infinite = (divergence, side) in (("forward_kl", "student"), ("reverse_kl", "teacher"))
    assert rows.isinf().tolist() == [False, False, infinite, False]
    assert not rows.isnan().any()
    assert gradient[[0, 1, 3]].isfinite().all()
    assert gradient[2].isfinite().all() == ((divergence, side) != ("reverse_kl", "teacher"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("bad", ["student-missing", "teacher-missing", "nan", "inf"])
def test_bad_rows_are_nan_and_alone(
    backend: str, device: torch.device, divergence: str, bad: str
) -> None:
    student, teacher = sides(device, V=4200)
    if bad == "student-missing":
        student = spoil(student, (1,), -INF)
    elif bad == "teacher-missing":
        teacher = spoil(teacher, (1,), -INF)
    else:
        student = spoil(student, (1, 17), float(bad))
    rows, gradient = rows_and_gradient(student, teacher, divergence=divergence, backend=backend)
    assert rows.isnan().tolist() == [False, True, False, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, False, False]


def test_missing_label_is_an_infinite_cross_entropy(backend: str, device: torch.device) -> None:
    student, _ = sides(device)
    labels = torch.tensor([0, 1, 2, 3], device=device)
    student = spoil(student, (1, 1), -INF)
    rows, gradient = rows_and_gradient(
        student, None, labels=labels, kd_weight=0.0, ce_weight=1.0, backend=backend
    )
    assert rows.isinf().tolist() == [False, True, False, False]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("teacher_given", [True, False])
def test_without_kd_the_teacher_is_not_read(
    backend: str, device: torch.device, teacher_given: bool
) -> None:
    student, teacher = sides(device)
    teacher.fill_(math.nan)
    labels = torch.tensor([0, 1, 2, -100], device=device)
    loss = kl_distillation(
        student,
        teacher if teacher_given else None,
        labels,
        kd_weight=0.0,
        ce_weight=2.0,
        backend=backend,
    )
    wanted = 2 * torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(loss, wanted)
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (loss, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("beta", "same"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_at_its_ends_is_the_kl_it_names(
    backend: str, device: torch.device, beta: float, same: str
) -> None:
    student, teacher = sides(device)
    ours = rows_and_gradient(student, teacher, divergence="jsd", beta=beta, backend=backend)
    wanted = rows_and_gradient(student, teacher, divergence=same, backend=backend)
    assert torch.equal(ours[0], wanted[0])
    assert torch.equal(ours[1], wanted[1])


def test_double_backward_raises(backend: str, device: torch.device) -> None:
    student, teacher = sides(device)
    loss = kl_distillation(student, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_float64_is_served_by_cpu_and_reference_only(backend: str, device: torch.device) -> None:
    student, teacher = (side.double() for side in sides(device))
    if backend in ("cpu", "reference"):
        loss = kl_distillation(student, teacher, backend=backend)
        assert loss.dtype == torch.float64
        wanted = kl_distillation(student, teacher, backend="reference")
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-13)
        return
    with pytest.raises(NotImplementedError, match=f"{backend}: kl_distillation serves float32"):
        kl_distillation(student, teacher, backend=backend)


def test_wrong_device_for_a_backend_says_why() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(NotImplementedError, match="cuda: "):
        kl_distillation(logits, logits, backend="cuda")


def test_every_element_is_written(
    backend: str, device: torch.device, poisoned_memory: None
) -> None:
    for V_s, V_t in ((40, 33), (33, 40), (4100, 4097)):
        student = torch.randn(3, V_s, device=device, requires_grad=True)
        teacher = torch.randn(3, V_t, device=device, requires_grad=True)
        loss = kl_distillation(student, teacher, vocab_align="truncate", backend=backend)
        gradients = torch.autograd.grad(loss, (student, teacher))
        assert all(gradient.isfinite().all() for gradient in gradients)
        shared = min(V_s, V_t)
        assert not gradients[0][:, shared:].any()
        assert not gradients[1][:, shared:].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("spoiled", ["student", "teacher"])
def test_nan_shows_where_the_block_around_it_is_missing(
    backend: str, device: torch.device, divergence: str, spoiled: str
) -> None:
    """Columns on both sides missing but for one NaN: what follows must not erase it."""
    student, teacher = sides(device, T=2, V=9000)
    student, teacher = (spoil(one, (0, slice(5000)), -INF) for one in (student, teacher))
    if spoiled == "student":
        student = spoil(student, (0, 77), math.nan)
    else:
        teacher = spoil(teacher, (0, 77), math.nan)
    options: dict[str, Any] = {"divergence": divergence, "backend": backend}
    rows, gradient = rows_and_gradient(student, teacher, **options)
    assert rows.isnan().tolist() == [True, False]
    assert gradient.isnan().any(-1).tolist() == [True, False]
