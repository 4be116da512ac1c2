"""kl_distillation against the law: values, gradients, sizes, strides, scaling, memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import kl_distillation
from deepfusion_kernels.bench.timing import peak_extra_bytes
from deepfusion_kernels.nn.losses import KLDistillationLoss
from tests.budget import UNIT, assert_within_budget
from tests.kl_eager import eager_rows, gradient_floor

STEM = "kl_distillation"
DIVERGENCES = (
    *(("forward_kl", 0.5), ("reverse_kl", 0.5)),
    *(("jsd", beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)),
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def logits(*shape: int, std: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape) * std).to(dtype)


def labels_for(student: Tensor) -> Tensor:
    """Every third row masked."""
    labels = torch.randint(student.shape[-1], student.shape[:-1])
    labels.view(-1)[1::3] = -100
    return labels


def value_and_gradients(
    function: Any, student: Tensor, teacher: Tensor, dloss: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (side.detach().requires_grad_() for side in (student, teacher))
    rows = function(student, teacher, **options)
    return (rows.detach(), *torch.autograd.grad(rows, (student, teacher), dloss.to(rows.dtype)))


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    if softcap is None:
        return logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    capped = softcap * torch.tanh(wide / softcap)
    return torch.where(logits <= -1e30, logits, capped)


def check_against_law(
    backend: str, device: torch.device, student: Tensor, teacher: Tensor, **options: Any
) -> None:
    """Row loss and both gradients of a backend, under a random upstream gradient, in budget."""
    student, teacher = student.to(device), teacher.to(device)
    labels, softcap = options.pop("labels", None), options.pop("softcap", None)
    labels = None if labels is None else labels.to(device)
    dloss = torch.randn(student.shape[:-1], device=device)
    door = {**options, "labels": labels, "reduction": "none"}
    door |= {"vocab_align": "truncate", "softcap": softcap}
    ours = value_and_gradients(kl_distillation, student, teacher, dloss, **door, backend=backend)
    wide = (student.double(), teacher.double())
    truth = value_and_gradients(kl_distillation, *wide, dloss, **door, backend="reference")

    def spelled(s: Tensor, t: Tensor, **options: Any) -> Tensor:
        return eager_rows(soft_capped(s, softcap), soft_capped(t, softcap), **options)

    eager = value_and_gradients(spelled, student, teacher, dloss, labels=labels, **options)
    capped = soft_capped(student, softcap), soft_capped(teacher, softcap)
    largest = float(truth[0].abs().max()) if truth[0].numel() else 0.0
    assert_within_budget(ours[0], eager[0], truth[0], "row loss", 4e-6 * max(1.0, largest))
    for index, name in ((1, "dstudent"), (2, "dteacher")):
        assert ours[index].dtype == (student, teacher)[index - 1].dtype
        unit = UNIT[ours[index].dtype]
        floor: Any = 0.0
        if truth[index].numel():
            floor = gradient_floor(*capped, truth[index], dloss, unit, **options)
        assert_within_budget(ours[index], eager[index], truth[index], name, floor)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_reference_is_the_law(divergence: str, beta: float, ce_weight: float) -> None:
    student, teacher = logits(4, 7).double(), logits(4, 7).double()
    options: dict[str, Any] = {
        "divergence": divergence,
        "beta": beta,
        "temperature": 1.7,
        "scale_by_temperature_squared": True,
        "kd_weight": 0.6,
        "ce_weight": ce_weight,
    }
    labels, dloss = labels_for(student), torch.randn(4).double()

    def rows(s: Tensor, t: Tensor) -> Tensor:
        return kl_distillation(s, t, labels, **options, reduction="none", backend="reference")

    inputs = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(rows, inputs)
    ours = value_and_gradients(lambda s, t: rows(s, t), student, teacher, dloss)
    spelled = value_and_gradients(eager_rows, student, teacher, dloss, labels=labels, **options)
    for mine, theirs in zip(ours, spelled, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_gradients_within_budget(
    backend: str, device: torch.device, divergence: str, beta: float, temperature: float
) -> None:
    student, teacher = logits(5, 33), logits(5, 33)
    options: dict[str, Any] = {"divergence": divergence, "beta": beta, "temperature": temperature}
    check_against_law(backend, device, student, teacher, **options)
    options |= {"ce_weight": 0.5, "kd_weight": 0.7, "scale_by_temperature_squared": True}
    options["labels"] = labels_for(student)
    check_against_law(backend, device, student, teacher, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("T", "V"), [(1, 1), (0, 33), (5, 4095), (3, 4097), (2, 32000)])
def test_odd_sizes_and_dtypes(
    backend: str, device: torch.device, T: int, V: int, dtype: torch.dtype
) -> None:
    divergence = ("forward_kl", "reverse_kl", "jsd")[V % 3]
    student, teacher = logits(T, V, dtype=dtype), logits(T, V, dtype=dtype)
    check_against_law(backend, device, student, teacher, divergence=divergence, temperature=2.0)


def test_many_rows(backend: str, device: torch.device) -> None:
    check_against_law(backend, device, logits(300, 40), logits(300, 40))


def test_sides_of_different_dtype(backend: str, device: torch.device) -> None:
    student, teacher = logits(3, 50), logits(3, 50, dtype=torch.bfloat16)
    check_against_law(backend, device, student, teacher, divergence="jsd")


@pytest.mark.parametrize(("V_s", "V_t"), [(40, 33), (33, 40), (5000, 4100)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_truncated_vocabularies(
    backend: str, device: torch.device, V_s: int, V_t: int, temperature: float
) -> None:
    student, teacher = logits(3, V_s), logits(3, V_t)
    labels = torch.tensor([0, V_s - 1, 7])
    options = {"temperature": temperature, "ce_weight": 0.3}
    check_against_law(backend, device, student, teacher, labels=labels, **options)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("kind", ["offset", "near", "std10", "std30", "bf16-std10"])
def test_hard_numerics(backend: str, device: torch.device, divergence: str, kind: str) -> None:
    """Offsets cancel, near teachers keep their gradient, far ones stay finite."""
    std = {"std10": 10.0, "std30": 30.0, "bf16-std10": 10.0}.get(kind, 3.0)
    dtype = torch.bfloat16 if kind == "bf16-std10" else torch.float32
    student, teacher = logits(4, 3000, std=std, dtype=dtype), logits(4, 3000, std=std, dtype=dtype)
    if kind == "offset":
        student, teacher = student + 30, teacher - 30
    if kind == "near":
        teacher = student + 0.03 * torch.randn_like(student)
    check_against_law(backend, device, student, teacher, divergence=divergence)


def test_near_teacher_gradient_keeps_its_relative_error(backend: str, device: torch.device) -> None:
    """m and ln l are kept apart: their sum would cost a digit of q - p."""
    student = (logits(4, 3000) + 40).to(device)
    teacher = student + 0.03 * torch.randn_like(student)
    dloss = torch.ones(4, device=device)
    ours = value_and_gradients(
        kl_distillation, student, teacher, dloss, reduction="none", backend=backend
    )[1]
    wide = (student.double(), teacher.double())
    truth = value_and_gradients(eager_rows, *wide, dloss)[1]
    limit = 3e-4 if backend == "reference" else 3e-5
    assert (ours - truth).norm() < limit * truth.norm()


@pytest.mark.parametrize("layout", ["1d", "3d", "sliced", "transposed", "4d", "columns"])
def test_layouts(backend: str, device: torch.device, layout: str) -> None:
    student, teacher = logits(3, 4, 40), logits(3, 4, 40)
    views = {
        "1d": lambda x: x[0, 0],
        "3d": lambda x: x,
        "sliced": lambda x: x[:, :-1],
        "transposed": lambda x: x.transpose(0, 1),
        "4d": lambda x: x.view(3, 2, 2, 40),
        "columns": lambda x: x[:, :, ::2],
    }
    check_against_law(backend, device, views[layout](student), views[layout](teacher))


def test_reductions_masks_and_row_weights(backend: str, device: torch.device) -> None:
    student = logits(2, 5, 33).to(device).requires_grad_()
    teacher = logits(2, 5, 33).to(device)
    labels = labels_for(student).int()
    weight = torch.rand(2, 5, device=device)
    weight[1, 4] = 0
    keep = (labels != -100) & (weight != 0)

    def call(reduction: str, **options: Any) -> Tensor:
        return kl_distillation(
            student, teacher, labels, reduction=reduction, backend=backend, **options
        )

    plain, weighted = call("none"), call("none", row_weight=weight)
    assert plain.shape == (2, 5)
    assert plain.dtype == torch.float32
    assert (plain[labels == -100] == 0).all()
    assert (weighted[~keep] == 0).all()
    torch.testing.assert_close(weighted, plain * weight * keep)
    torch.testing.assert_close(call("sum", row_weight=weight), weighted.sum())
    torch.testing.assert_close(call("mean"), plain.sum() / (labels != -100).sum())
    mean = call("mean", row_weight=weight)
    torch.testing.assert_close(mean, weighted.sum() / (weight * keep).sum())
    # upstream gradient, and 'sum' over a global count == 'mean'
    (one,) = torch.autograd.grad(mean * 3, student)
    (other,) = torch.autograd.grad(
        call("sum", row_weight=weight) * (3 / (weight * keep).sum()), student
    )
    torch.testing.assert_close(one, other)
    assert (one[~keep] == 0).all()


def test_only_wanted_gradients(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepfusion_kernels.ops.kl_distillation import op

    wanted: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    backward = op.IMPLS[backend].backward

    def spy(*args: Any) -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = backward(*args)
        wanted.append((tuple(gradients[0].shape), tuple(gradients[1].shape)))
        return gradients

    monkeypatch.setattr(op.IMPLS[backend], "backward", spy)
    for student_wants, teacher_wants in ((True, False), (False, True), (True, True)):
        student = logits(3, 9).to(device).requires_grad_(student_wants)
        teacher = logits(3, 9).to(device).requires_grad_(teacher_wants)
        kl_distillation(student, teacher, backend=backend).backward()
        assert (student.grad is not None) == student_wants
        assert (teacher.grad is not None) == teacher_wants
    whole, none = (1, 3, 9), (0,)
    assert wanted == [(whole, none), (none, whole), (whole, whole)]


def test_retained_graph_gives_equal_bits_and_repeats_do(backend: str, device: torch.device) -> None:
    student, teacher = logits(5, 4200).to(device).requires_grad_(), logits(5, 4200).to(device)
    loss = kl_distillation(student, teacher, divergence="jsd", backend=backend)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    again = kl_distillation(student, teacher, divergence="jsd", backend=backend)
    assert torch.equal(loss, again)


def test_views_are_not_copied_and_only_the_gradient_is_allocated() -> None:
    student = logits(64, 5, 1000)
    teacher = logits(64, 5, 1000)
    student.requires_grad_()
    s, t = student[:, :-1].detach().requires_grad_(), teacher[:, :-1]

    def call() -> Tensor:
        (gradient,) = torch.autograd.grad(kl_distillation(s, t), s)
        return gradient

    call()
    gradient_bytes = s.numel() * s.element_size()
    assert peak_extra_bytes(call, torch.device("cpu")) < 1.05 * gradient_bytes


def test_module_hands_its_options_on() -> None:
    student, teacher, labels = logits(6, 11), logits(6, 11), torch.randint(11, (6,))
    loss = KLDistillationLoss(divergence="jsd", beta=0.2, temperature=3.0, ce_weight=0.5)
    weight = torch.rand(6)
    wanted = kl_distillation(
        student,
        teacher,
        labels,
        divergence="jsd",
        beta=0.2,
        temperature=3.0,
        ce_weight=0.5,
        row_weight=weight,
    )
    assert torch.equal(loss(student, teacher, labels, weight), wanted)
    assert "temperature=3.0" in repr(loss)
