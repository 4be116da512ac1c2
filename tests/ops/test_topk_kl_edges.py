"""Top-k distillation at its edges: padding, masks, infinities, slices, refusals."""

import pytest
import torch

from deepfusion_kernels import topk_kl_distillation
from tests.ops.topk_inputs import KINDS, gradient, teacher_of

STEM = "topk_kl"
pytestmark = pytest.mark.usefixtures("on_device")


@pytest.mark.parametrize("tail,divergence", KINDS)
def test_padding_and_repeated_ids_add_nothing(tail: str, divergence: str, backend: str) -> None:
    logits, options = (
        torch.randn(3, 20),
        {"tail": tail, "divergence": divergence, "backend": backend},
    )
    ids, logprobs = teacher_of(3, 20, 4)
    logprobs = logprobs.float()
    more = torch.cat([ids, torch.tensor([[-1, 20, 2**31 - 1]] * 3), ids[:, :2]], 1)
    extra = torch.cat([logprobs, torch.zeros(3, 3), torch.zeros(3, 2)], 1)
    plain = gradient(logits, ids, logprobs, upstream=torch.ones(3), **options)
    padded = gradient(logits, more.int(), extra, upstream=torch.ones(3), **options)
    for ours, wanted in zip(padded, plain, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("tail,divergence", KINDS)
def test_a_row_of_padding_has_no_loss(tail: str, divergence: str, backend: str) -> None:
    ids, logprobs = torch.full((2, 3), -1), torch.zeros(2, 3)
    for kept in (3, 0):
        rows, found = gradient(
            torch.randn(2, 9), ids[:, :kept], logprobs[:, :kept], upstream=torch.ones(2), tail=tail,
            divergence=divergence, backend=backend,
        )  # fmt: skip
        assert rows.abs().max() < 1e-6
        assert found.abs().max() < 1e-6


def test_masked_rows_are_never_read(backend: str, poisoned_memory: None) -> None:
    logits = torch.randn(4, 12)
    logits[1], logits[2] = torch.nan, torch.inf
    ids, logprobs = teacher_of(4, 12, 3)
    labels, weight = torch.tensor([0, -100, 5, 2]), torch.tensor([1.0, 1.0, 0.0, 3.0])
    logits.requires_grad_()
    loss = topk_kl_distillation(
        logits, ids, logprobs.float(), labels, row_weight=weight, ce_weight=1.0, backend=backend
    )
    loss.backward()
    kept = [0, 3]
    rows = topk_kl_distillation(
        logits[kept],
        ids[kept],
        logprobs[kept].float(),
        labels[kept],
        ce_weight=1.0,
        reduction="none",
        backend=backend,
    )
    torch.testing.assert_close(loss, (rows * weight[kept]).sum() / 4)
    assert logits.grad is not None
    assert (logits.grad[1:3] == 0).all()
    none = topk_kl_distillation(
        logits, ids, logprobs.float(), torch.full((4,), -100), backend=backend
    )
    assert none == 0


def test_infinities_stay_in_their_row(backend: str) -> None:
    logits = torch.randn(5, 6)
    logits[0, 0], logits[1], logits[2, 3], logits[4, 5] = (
        -torch.inf,
        -torch.inf,
        torch.nan,
        -torch.inf,
    )
    ids = torch.arange(2).expand(5, 2)
    logprobs = torch.full((5, 2), 0.25).log()
    rows = topk_kl_distillation(logits, ids, logprobs, reduction="none", backend=backend)
    assert rows[0] == torch.inf
    assert rows[1:3].isnan().all()
    assert rows[3:].isfinite().all()


def test_nan_shows_where_the_block_around_it_is_missing(backend: str) -> None:
    logits = torch.randn(2, 9000)
    logits[0, :5000] = -torch.inf
    logits[0, 77] = torch.nan
    ids = torch.tensor([[8000, 8500]]).expand(2, 2)
    logprobs = torch.full((2, 2), 0.25).log()
    rows = topk_kl_distillation(logits, ids, logprobs, reduction="none", backend=backend)
    assert rows.isnan().tolist() == [True, False]


def test_slices_and_leading_dimensions(backend: str) -> None:
    logits, (ids, logprobs) = torch.randn(2, 5, 7), teacher_of(8, 7, 3)
    ids, logprobs = ids.view(2, 4, 3), logprobs.view(2, 4, 3).float()
    for view in (
        logits[:, :-1],
        logits.transpose(0, 1)[:4].transpose(0, 1),
        logits[:, 1:, :].clone(),
    ):
        rows, found = gradient(view, ids, logprobs, upstream=torch.ones(2, 4), backend=backend)
        flat, wanted = gradient(
            view.reshape(8, 7),
            ids.view(8, 3),
            logprobs.view(8, 3),
            upstream=torch.ones(8),
            backend=backend,
        )
        assert torch.equal(rows.view(8), flat)
        assert torch.equal(found.view(8, 7), wanted)
    single = topk_kl_distillation(logits[0, 0], ids[0, 0], logprobs[0, 0], backend=backend)
    assert torch.equal(
        single, topk_kl_distillation(logits[:1, 0], ids[:1, 0], logprobs[:1, 0], backend=backend)
    )
    empty = torch.randn(0, 7, requires_grad=True)
    loss = topk_kl_distillation(empty, ids.view(8, 3)[:0], logprobs.view(8, 3)[:0], backend=backend)
    loss.backward()
    assert loss == 0
    assert empty.grad is not None


def test_two_backwards_agree_and_a_second_derivative_is_refused(backend: str) -> None:
    logits = torch.randn(3, 8, requires_grad=True)
    ids, logprobs = teacher_of(3, 8, 2)
    loss = topk_kl_distillation(logits, ids, logprobs.float(), backend=backend)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, logits, create_graph=True)
    torch.testing.assert_close(3 * first, second.detach())
    with pytest.raises(RuntimeError):
        second.sum().backward()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"tail": "drop"}, "tail must be one of"),
        ({"tail": "zero", "divergence": "jsd"}, "divergence with tail 'zero' must be"),
        (
            {"teacher_ids": torch.zeros(2, 2, dtype=torch.int64)},
            r"teacher_ids must be \[..., K\] = \[3, 2\]",
        ),
        ({"teacher_ids": torch.zeros(3, 2)}, "teacher_ids must have dtype int64, int32"),
        (
            {"teacher_logprobs": torch.zeros(3, 2, requires_grad=True)},
            "teacher_logprobs must be detached",
        ),
        ({"teacher_ids": None}, "teacher_ids must be given when"),
        ({"ce_weight": 1.0}, "labels must be given when"),
        ({"ce_weight": 1.0, "labels": torch.tensor([0, 8, 1])}, r"labels must be in .* = \[0, 8\)"),
        ({"labels": torch.zeros(3)}, "labels must have dtype int64, int32"),
        ({"temperature": 0.0}, "temperature must be finite and >= 1e-6"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str, backend: str) -> None:
    arguments: dict[str, object] = {
        "student_logits": torch.zeros(3, 8),
        "teacher_ids": torch.zeros(3, 2, dtype=torch.int64),
        "teacher_logprobs": torch.zeros(3, 2),
    }
    with pytest.raises(ValueError, match=message):
        topk_kl_distillation(**(arguments | change), backend=backend)


def test_triton_declines_more_than_256_kept_tokens() -> None:
    ids, logprobs = teacher_of(2, 300, 257)
    with pytest.raises(NotImplementedError, match="K <= 256, got K = 257"):
        topk_kl_distillation(torch.zeros(2, 300), ids, logprobs, backend="triton")
