"""topk_logprobs: values and ids of both inputs, chunks, memory, edges; the loss that reads them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import topk_kl_distillation, topk_logprobs
from deepfusion_kernels.bench.timing import peak_extra_bytes
from tests.budget import assert_within_budget

STEM = "topk_kl"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("on_device")


def check(logits: Tensor, found: tuple[Tensor, Tensor], k: int, tau: float, wide: Tensor) -> None:
    """Largest first, distinct ids, their own log-probabilities within budget of float64."""
    ids, logprobs = found
    assert ids.dtype == torch.int64
    assert ids.shape == logprobs.shape == (*logits.shape[:-1], k)
    chosen = logits.double().gather(-1, ids)
    torch.testing.assert_close(chosen, logits.double().topk(k).values, rtol=0, atol=0)
    assert all(len(set(row)) == k for row in ids.reshape(-1, k).tolist())
    truth = (wide / tau).log_softmax(-1).gather(-1, ids)
    eager = (logits.float() / tau).log_softmax(-1).gather(-1, ids)
    assert_within_budget(logprobs, eager, truth, "logprobs", 4e-6 * max(1.0, truth.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "V", "k", "tau"),
    [(3, 33, 1, 1.0), (5, 33, 33, 2.0), (2, 4099, 40, 0.5), (1, 1, 1, 4.0)],
)
def test_logits_within_budget(
    T: int, V: int, k: int, tau: float, dtype: torch.dtype, backend: str, poisoned_memory: None
) -> None:
    logits = (3 * torch.randn(T, V)).to(dtype)
    found = topk_logprobs(logits, k, temperature=tau, backend=backend)
    assert found[1].dtype == torch.float32
    check(logits, found, k, tau, logits.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_bytes", [None, 1, 300])
def test_hidden_states_give_the_logprobs_of_their_logits(
    dtype: torch.dtype, chunk_bytes: int | None, backend: str, poisoned_memory: None
) -> None:
    hidden, weight = torch.randn(2, 3, 7).to(dtype), torch.randn(40, 7).to(dtype)
    bias = torch.randn(40).to(dtype)
    options: dict[str, Any] = {"weight": weight, "temperature": 2.0, "backend": backend}
    for given in (None, bias):
        found = topk_logprobs(hidden, 4, bias=given, chunk_bytes=chunk_bytes, **options)
        wide = hidden.double() @ weight.double().T
        wide = wide if given is None else wide + given.double()
        truth = (wide / 2).log_softmax(-1).topk(4)
        assert torch.equal(found[0], truth.indices)
        assert_within_budget(found[1], truth.values.float(), truth.values, "logprobs", 4e-6)


def test_float64_and_long_rows_on_the_cpu() -> None:
    """Several refills of the candidates, and none of them lost."""
    logits = torch.randn(3, 9000, dtype=torch.float64).cumsum(-1)
    for k in (1, 700, 5000):
        ids, logprobs = topk_logprobs(logits, k, backend="cpu")
        truth = logits.log_softmax(-1).topk(k)
        assert torch.equal(ids, truth.indices)
        torch.testing.assert_close(logprobs, truth.values, rtol=1e-12, atol=1e-12)


def test_equal_logits_give_the_smaller_ids_on_the_cpu() -> None:
    for backend in ("cpu", "reference"):
        ids, _ = topk_logprobs(torch.zeros(2, 3000), 4, backend=backend)
        assert ids.tolist() == [[0, 1, 2, 3]] * 2


def test_missing_columns_and_bad_rows(backend: str) -> None:
    logits = torch.randn(5, 12)
    logits[0, 2:] = -torch.inf
    logits[1] = -torch.inf
    logits[2, 3], logits[3, 4] = torch.nan, torch.inf
    logits[4, 1:] = torch.finfo(torch.float32).min
    _, logprobs = topk_logprobs(logits, 3, backend=backend)
    assert logprobs[0, :2].isfinite().all()
    assert logprobs[0, 2] == -torch.inf
    assert logprobs[1:4].isnan().all()
    assert logprobs[4].tolist() == [0.0, -torch.inf, -torch.inf]


def test_the_loss_reads_them(backend: str) -> None:
    """With every token kept the bucket is empty, and a student equal to the teacher has no loss."""
    logits = torch.randn(4, 20)
    ids, logprobs = topk_logprobs(logits, 20, temperature=2.0, backend=backend)
    loss = topk_kl_distillation(logits, ids, logprobs, temperature=2.0, backend=backend)
    assert loss.abs() < 1e-6


def test_logits_are_not_widened_whole() -> None:
    logits = torch.randn(600, 4000).bfloat16()

    def call() -> Tensor:
        return topk_logprobs(logits, 8)[1]

    call()
    assert peak_extra_bytes(call, torch.device("cpu")) < 0.05 * logits.numel() * 4


def test_hidden_states_are_projected_a_chunk_at_a_time() -> None:
    hidden, weight = torch.randn(600, 8), torch.randn(4000, 8)

    def call() -> Tensor:
        return topk_logprobs(hidden, 8, weight=weight, chunk_bytes=64 * 4000 * 4)[1]

    call()
    assert peak_extra_bytes(call, torch.device("cpu")) < 0.2 * 600 * 4000 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"k must be in \[1, V\] = \[1, 8\], got 0"),
        ({"k": 9}, r"k must be in \[1, V\] = \[1, 8\], got 9"),
        ({"temperature": 0.0}, "temperature must be finite"),
        ({"weight": torch.zeros(9, 7)}, r"weight must be \[V, D\] = \[V, 8\]"),
        ({"weight": torch.zeros(9, 8).half()}, "weight must have dtype float32"),
        ({"bias": torch.zeros(8)}, "bias must be given with a weight"),
        ({"chunk_bytes": 0}, "chunk_bytes must be positive"),
        ({"logits_or_hidden": torch.zeros(3, 8, requires_grad=True)}, "the teacher must be det"),
        ({"logits_or_hidden": torch.tensor(1.0)}, r"logits_or_hidden must be \[..., C\]"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits_or_hidden": torch.zeros(3, 8), "k": 2}
    with pytest.raises(ValueError, match=message):
        topk_logprobs(**(arguments | change))


def test_no_rows(backend: str) -> None:
    ids, logprobs = topk_logprobs(torch.zeros(2, 0, 5), 3, backend=backend)
    assert ids.shape == logprobs.shape == (2, 0, 3)
