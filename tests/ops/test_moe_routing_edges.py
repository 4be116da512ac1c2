"""The router at its edges: NaN, infinities, no tokens, one choice, perfect balance."""

import pytest
import torch

from deepfusion_kernels import moe_route
from tests.budget import assert_within_budget
from tests.ops.routing_spelling import INF, LOSSES, MODES, NAN, name_of, route, with_groups

STEM = "moe_routing"


@pytest.mark.parametrize("losses", ({}, LOSSES), ids=("weights", "losses"))
@pytest.mark.parametrize("mode", MODES, ids=name_of)
@pytest.mark.usefixtures("poisoned_memory")
def test_nan_and_infinite_logits(mode, losses, backend, device) -> None:
    mode = {**with_groups(mode, 4, 2), **losses}
    z = torch.randn(6, 12)
    z[0, 3] = NAN
    z[1] = NAN
    z[2] = -INF
    z[3, 4:] = -INF
    z[3, :4] = torch.tensor([1.0, 3.0, 2.0, 0.0])
    z[4] = torch.where(torch.arange(12) % 2 == 0, NAN, -INF)
    z = z.to(device).requires_grad_()
    for bias in (None, torch.linspace(-1, 1, 12, device=device)):
        routing = route(z, 4, mode, bias, backend)
        assert routing.counts.sum() == 24
        for row in routing.experts.tolist():
            assert len(set(row)) == 4
            assert all(0 <= e < 12 for e in row)
        assert routing.experts[1].tolist() == [0, 1, 2, 3]
        assert routing.experts[2].tolist() == [0, 1, 2, 3]
        is_nan = routing.weights.isnan()
        assert is_nan[[0, 1, 2, 4]].all()
        assert not is_nan[5].any()
        if mode["score"] == "sigmoid" or mode["order"] == "score_then_topk":
            assert 3 not in routing.experts[0].tolist() or (
                mode["score"] == "softmax" and (bias is not None or "group_score" in mode)
            )
        if bias is None and mode.get("group_score") != "top2_sum":
            assert routing.experts[3].tolist() == [1, 2, 0, 3]
        assert bool(losses) == bool(routing.aux_loss.isnan())
        (grad,) = torch.autograd.grad(routing.weights.nansum() + routing.aux_loss, z)
        assert grad[2].isnan().any()
        if not losses:
            assert grad[5].isfinite().all()
        truth = route(z.detach().double(), 4, mode, bias, "reference")
        assert torch.equal(routing.experts, truth.experts)
        assert_within_budget(routing.weights, truth.weights, truth.weights, "weights")


def test_a_group_of_both_infinities_sorts_last(backend, device) -> None:
    """inf - inf is no number: such a group must not be chosen, nor lead out of the row."""
    z = torch.tensor([[INF, -INF, INF, -INF, 1.0, 2.0], [INF, -INF] * 3], device=device)
    options = {"num_groups": 3, "top_groups": 2, "group_score": "top2_sum"}
    routing = moe_route(z, 3, score="sigmoid", order="topk_then_score", backend=backend, **options)
    assert routing.experts.tolist() == [[0, 5, 4], [0, 2, 1]]


def test_masked_experts_get_weight_zero(backend, device) -> None:
    z = torch.tensor([[1.0, -INF, 2.0, -INF]], device=device, requires_grad=True)
    for score in ("softmax", "sigmoid"):
        routing = moe_route(z, 3, score=score, renormalize=True, backend=backend)
        assert routing.experts.tolist() == [[2, 0, 1]]
        assert routing.weights[0, 2] == 0
        (grad,) = torch.autograd.grad(routing.weights[0, 0], z)
        assert grad.isfinite().all()


@pytest.mark.parametrize("score", ("softmax", "sigmoid"))
def test_extreme_logits(score, backend, device) -> None:
    z = torch.tensor([[3e38, -3e38, 0.0, 88.0], [200.0, 100.0, 320.0, -300.0]], device=device)
    z.requires_grad_()
    routing = moe_route(z, 2, score=score, balance_loss_weight=1.0, backend=backend)
    assert routing.experts.tolist() == [[0, 3], [2, 0]]
    wanted = [[1.0, 0.0], [1.0, 0.0]] if score == "softmax" else [[1.0, 1.0], [1.0, 1.0]]
    assert routing.weights.tolist() == wanted
    (routing.weights.sum() + routing.aux_loss).backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("mode", MODES, ids=name_of)
def test_no_tokens(mode, backend, device) -> None:
    z = torch.zeros(0, 8, device=device, requires_grad=True)
    routing = route(z, 2, {**with_groups(mode, 2, 1), **LOSSES}, None, backend)
    assert routing.weights.shape == routing.experts.shape == (0, 2)
    assert routing.counts.tolist() == [0] * 8
    assert routing.aux_loss.item() == 0
    (routing.weights.sum() + routing.aux_loss).backward()
    assert z.grad.shape == (0, 8)


def test_balanced_layer_has_balance_loss_k(backend, device) -> None:
    """Every expert chosen equally often by equal scores: E sum f P = K."""
    z = torch.eye(8, device=device) * 1e-6
    routing = moe_route(z + z.roll(1, 0), 2, balance_loss_weight=1.0, backend=backend)
    assert routing.counts.tolist() == [2] * 8
    assert routing.aux_loss.item() == pytest.approx(2.0, abs=1e-5)


@pytest.mark.parametrize("order", ("score_then_topk", "topk_then_score"))
def test_one_selected_softmax_warns_and_is_constant(order, backend, device) -> None:
    z = torch.randn(4, 3, device=device, requires_grad=True)
    with pytest.warns(UserWarning, match="gives? the router no gradient") as caught:
        routing = moe_route(z, 1, order=order, renormalize=True, scale=0.5, backend=backend)
    assert len(caught) == 1
    assert routing.weights.tolist() == [[0.5]] * 4
    routing.weights.sum().backward()
    assert torch.equal(z.grad, torch.zeros(4, 3, device=device))
