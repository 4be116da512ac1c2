"""The router: every mode against a second spelling, in values, choices and gradients."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.budget import UNIT, assert_within_budget
from tests.ops.routing_spelling import LOSSES, MODES, name_of, oracle, route, spelled, with_groups

STEM = "moe_routing"


@pytest.mark.parametrize("losses", ({}, LOSSES), ids=("weights", "losses"))
@pytest.mark.parametrize("mode", MODES, ids=name_of)
def test_reference_is_its_second_spelling(mode, losses) -> None:
    mode = {**with_groups(mode, 4, 2), **losses}
    z = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    for bias in (None, torch.randn(12, dtype=torch.float64)):
        ours = route(z, 3, mode, bias, "reference")
        weights, ids, aux_loss = spelled(z, 3, mode, bias)
        assert torch.equal(ours.experts, ids)
        assert ours.counts.tolist() == [int((ids == e).sum()) for e in range(12)]
        torch.testing.assert_close(ours.weights, weights)
        torch.testing.assert_close(ours.aux_loss, aux_loss.expand(()))
        pull = torch.randn(6, 3, dtype=torch.float64)
        totals = [
            (w * pull).sum() + a for w, a in ((ours.weights, ours.aux_loss), (weights, aux_loss))
        ]
        grads = [torch.autograd.grad(total, z)[0] for total in totals]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    if losses:

        def door(z: Tensor) -> tuple[Tensor, Tensor]:
            routing = route(z, 3, mode, None, "reference")
            # counts are constants: a balance loss would not pass unless they stay as they are
            return routing.weights, routing.aux_loss

        assert torch.autograd.gradcheck(door, z.detach().requires_grad_())


SIZES = ((1, 1, 1), (7, 2, 1), (60, 4, 10), (64, 6, 8), (128, 8, 8), (1000, 32, 10))


@pytest.mark.parametrize("dtype", UNIT, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"E{s[0]}-K{s[1]}")
@pytest.mark.usefixtures("poisoned_memory")
def test_every_mode_within_budget(size, dtype, backend, device) -> None:
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("cuda serves no float64")
    (E, K, num_groups), T = size, 37
    z = torch.randn(T, E).to(dtype).to(device)
    pull = torch.randn(T, K, device=device)
    for mode, losses, biased in itertools.product(MODES, ({}, LOSSES), (False, True)):
        if "group_score" in mode and E // num_groups < 2:
            continue
        mode = {**with_groups(mode, num_groups, max(1, num_groups // 2)), **losses}
        bias = torch.randn(E, device=device) if biased else None
        results = []
        ids = None
        for kind in ("truth", "eager", "ours"):
            leaf = (z.double() if kind == "truth" else z.clone()).requires_grad_()
            if kind == "eager":
                weights, _, aux_loss = spelled(leaf, K, mode, bias, ids)
            else:
                routing = route(leaf, K, mode, bias, "reference" if kind == "truth" else backend)
                weights, experts, counts, aux_loss = routing
                ids = experts if ids is None else ids
                assert torch.equal(experts, ids), (kind, name_of(mode))
                assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=E))
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert kind == "truth" or weights.dtype == wide
            total = (weights * pull.to(weights.dtype)).sum() + aux_loss
            results.append(
                (weights.detach(), aux_loss.detach(), torch.autograd.grad(total, leaf)[0])
            )
        truth, plain, ours = results
        assert ours[2].dtype == dtype
        for what, a, b, c in zip(
            ("weights", "aux_loss", "dlogits"), ours, plain, truth, strict=True
        ):
            assert_within_budget(a, b, c, f"{what} of {name_of(mode)}")


@pytest.mark.parametrize("mode", MODES, ids=name_of)
def test_ties_go_to_the_lowest_index(mode, backend, device) -> None:
    """Logits of three values only, and a bias of two: groups tie as well as experts."""
    mode = with_groups(mode, 4, 2)
    z = torch.randint(-1, 2, (50, 24)).float()
    for bias in (None, torch.randint(0, 2, (24,)) * 0.5):
        score = z.softmax(-1) if mode["score"] == "softmax" else z.sigmoid()
        c = (score if mode["order"] == "score_then_topk" else z) + (0 if bias is None else bias)
        on_device = None if bias is None else bias.to(device)
        routing = route(z.to(device), 5, mode, on_device, backend)
        assert torch.equal(routing.experts.cpu(), oracle(c, 5, mode))
