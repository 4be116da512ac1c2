"""The loss without predictions: the law, pooling, reductions, chunks, edges."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepfusion_kernels import fused_linear_mse
from deepfusion_kernels.catalog import CATALOG
from tests.budget import assert_within_budget

STEM = "fused_linear_mse"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASES = [
    case for case in CATALOG[STEM].cases if case.name in ("tiny-tail", "tiny-p1", "demo-stage")
]
LEAVES = ("features", "weight", "bias")


def eager(features, weight, bias, target, *, patch_size, target_norm=False, **_) -> Tensor:
    """F.linear and F.mse_loss in the input dtype, the error in float32."""
    Q = features.shape[1]
    cuts = [slice(i * patch_size, (i + 1) * patch_size) for i in range(Q)]
    goal = torch.stack([target[:, cut].mean(1) for cut in cuts], 1)
    goal = F.layer_norm(goal, goal.shape[-1:], eps=1e-6) if target_norm else goal
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    return F.mse_loss(F.linear(features, weight, bias).to(wide), goal.to(wide))


def run(function, given, **options) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss = function(**given, **options)
    return loss.detach(), torch.autograd.grad(loss, [given[name] for name in LEAVES])


def rows(dtype=torch.float32, N=9, D=6, M=7) -> dict[str, Tensor]:
    shapes = {"features": (N, D), "weight": (M, D), "bias": (M,)}
    given = {k: torch.randn(v).to(dtype).requires_grad_() for k, v in shapes.items()}
    return given | {"target": torch.randn(N, M).to(dtype)}


@pytest.mark.parametrize("target_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=("f64", "f32", "bf16", "f16"))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_budget(case, dtype, target_norm, backend, device, poisoned_memory) -> None:
    given = case.make(device, dtype, 0)
    exact = {
        k: v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for k, v in given.items()
    }
    ours, ours_grads = run(fused_linear_mse, given, target_norm=target_norm, backend=backend)
    plain, plain_grads = run(eager, given, target_norm=target_norm)
    truth, truth_grads = run(fused_linear_mse, exact, target_norm=target_norm, backend="reference")
    assert_within_budget(ours, plain, truth, "loss", 4e-6 * truth)
    for i, name in enumerate(LEAVES):
        assert_within_budget(ours_grads[i], plain_grads[i], truth_grads[i], f"d{name}")


@pytest.mark.parametrize("target_norm", [False, True])
def test_reference_equals_the_second_spelling(target_norm: bool) -> None:
    given = CASES[0].make(torch.device("cpu"), torch.float64, 0)
    loss, grads = run(fused_linear_mse, given, target_norm=target_norm, backend="reference")
    other, other_grads = run(eager, given, target_norm=target_norm)
    torch.testing.assert_close((loss, grads), (other, other_grads))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_and_reductions(reduction, backend) -> None:
    given, weight = rows(torch.float64), torch.rand(9).double()
    weight[4] = 0

    def loss(*leaves: Tensor, **options) -> Tensor:
        named = dict(zip(LEAVES, leaves, strict=True))
        return fused_linear_mse(
            **given | named, row_weight=weight, reduction=reduction, backend=backend, **options
        )

    leaves = [given[name] for name in LEAVES]
    assert torch.autograd.gradcheck(loss, leaves)
    error = (F.linear(*leaves) - given["target"]).square()
    wanted = {
        "mean": (weight[:, None] * error).sum() / (7 * weight.sum()),
        "sum": (weight[:, None] * error).sum(),
        "none": weight * error.mean(1),
    }[reduction]
    torch.testing.assert_close(loss(*leaves), wanted)
    torch.testing.assert_close(loss(*leaves, chunk_rows=4), wanted)


def test_token_weights_give_the_token_level_gradient(backend) -> None:
    """w = n: the pooled loss and that of every token differ by a constant."""
    given = CASES[0].make(torch.device("cpu"), torch.float64, 0)
    counts = torch.tensor([4.0, 4.0, 1.0]).double().expand(2, 3)
    _, ours = run(fused_linear_mse, given, row_weight=counts, backend=backend)
    repeated = given["features"].repeat_interleave(4, dim=1)[:, :9]
    loss = F.mse_loss(F.linear(repeated, given["weight"], given["bias"]), given["target"])
    tokens = torch.autograd.grad(loss, [given[name] for name in LEAVES])
    torch.testing.assert_close(ours, tokens)


def test_masked_and_weightless_rows_are_never_read(backend, poisoned_memory) -> None:
    given = rows()
    given["target"][3] = torch.nan
    weight = torch.ones(9)
    weight[3] = 0
    loss, grads = run(fused_linear_mse, given, row_weight=weight, backend=backend)
    assert loss.isfinite()
    assert not grads[0][3].any()
    assert all(grad.isfinite().all() for grad in grads)
    seen, _ = run(fused_linear_mse, given, backend=backend)
    assert seen.isnan()
    each = fused_linear_mse(**given, reduction="none", backend=backend)
    assert each.isnan().tolist() == [n == 3 for n in range(9)]
    none, zeros = run(fused_linear_mse, given, row_weight=torch.zeros(9), backend=backend)
    assert none == 0
    assert not any(grad.any() for grad in zeros)


def test_no_rows_is_zero(backend) -> None:
    loss, grads = run(fused_linear_mse, rows(N=0), backend=backend)
    assert loss == 0
    assert not any(grad.any() for grad in grads)


def test_equal_prediction_and_target_is_zero(backend) -> None:
    given = rows(torch.float64)
    given["features"] = torch.eye(6).double().requires_grad_()
    given["target"] = given["weight"].detach().t() + given["bias"].detach()
    loss, grads = run(fused_linear_mse, given, backend=backend)
    assert loss == 0
    assert not any(grad.any() for grad in grads)


def test_frozen_head_no_bias_two_backwards_and_upstream(backend) -> None:
    given = rows(torch.float64)
    _, whole = run(fused_linear_mse, given | {"bias": torch.zeros(7).double().requires_grad_()})
    features = given["features"]
    loss = fused_linear_mse(
        features, given["weight"].detach(), None, given["target"], backend=backend
    )
    for _ in range(2):
        (grad,) = torch.autograd.grad(3 * loss, features, retain_graph=True)
        torch.testing.assert_close(grad, 3 * whole[0])
    (grad,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), features)


@pytest.mark.parametrize("changes, words", [
    ({"weight": torch.zeros(7, 5)}, "features must be"),
    ({"target": torch.zeros(9, 8)}, "target must be"),
    ({"target": torch.zeros(8, 7)}, "target must be"),
    ({"bias": torch.zeros(7).double()}, "bias must have dtype"),
    ({"target": torch.zeros(9, 7, requires_grad=True)}, "without gradient"),
    ({"reduction": "max"}, "reduction must be one of"),
    ({"row_weight": torch.zeros(3)}, "row_weight must be"),
    ({"chunk_rows": 0}, "chunk_rows must be >= 1"),
    ({"target_mask": torch.ones(9, 7)}, "target_mask must be None"),
    ({"patch_size": 2}, "features must be"),
])  # fmt: skip
def test_refused_with_its_name(changes, words) -> None:
    with pytest.raises(ValueError, match=words):
        fused_linear_mse(**rows() | changes)


def test_opcheck_and_compile(backend) -> None:
    given = rows()
    torch._dynamo.reset()
    for reduction in ("mean", "none"):

        def call(*leaves: Tensor, reduction: str = reduction) -> Tensor:
            return fused_linear_mse(*leaves, given["target"], reduction=reduction, backend=backend)

        leaves = [given[name] for name in LEAVES]
        compiled = torch.compile(call, fullgraph=True)(*leaves)
        torch.testing.assert_close(compiled, call(*leaves))
        compiled.sum().backward()
    offsets = torch.arange(10, dtype=torch.int32)[None]
    inputs = (*leaves, given["target"][None], offsets, None, None)
    options = (True, 4)
    torch.library.opcheck(
        torch.ops.deepfusion.fused_linear_mse,
        (*inputs, True, *options, True, True, True, backend),
    )
    torch.library.opcheck(torch.ops.deepfusion.fused_linear_mse_rows, (*inputs, *options, backend))
