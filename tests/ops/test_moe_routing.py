"""The router: every mode against a second spelling, ties, NaN, losses, and each gradient."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import Routing, moe_route
from deepfusion_kernels.catalog import CATALOG
from deepfusion_kernels.ops.moe_routing import op
from tests.budget import UNIT, assert_within_budget

STEM = "moe_routing"
NAN, INF = float("nan"), float("inf")
GROUPS = ({}, {"group_score": "max"}, {"group_score": "top2_sum"})
MODES = [
    {"score": score, "order": order, "renormalize": renormalize, "scale": 2.5, **group}
    for score, order, renormalize, group in itertools.product(
        ("softmax", "sigmoid"), ("score_then_topk", "topk_then_score"), (False, True), GROUPS
    )
]
LOSSES = {"balance_loss_weight": 0.7, "z_loss_weight": 0.3}


def name_of(mode: dict[str, Any]) -> str:
    parts = (mode["score"], mode["order"][:4], "renorm" if mode["renormalize"] else "plain")
    return "-".join((*parts, mode.get("group_score", "whole")))


def spelled(
    z: Tensor, K: int, mode: dict[str, Any], bias: Tensor | None, ids: Tensor | None = None
):
    """The router from torch's own functions and a sort of Python's: weights, ids, aux_loss."""
    T, E = z.shape
    z = z.float() if z.dtype != torch.float64 else z
    score = torch.sigmoid if mode["score"] == "sigmoid" else lambda x: x.softmax(-1)
    s = score(z)
    if ids is None:
        c = (s if mode["order"] == "score_then_topk" else z) + (0 if bias is None else bias)
        ids = oracle(c.detach(), K, mode)
    first = mode["order"] == "score_then_topk"
    u = s.gather(-1, ids) if first else score(z.gather(-1, ids))
    w = mode["scale"] * (u / u.sum(-1, keepdim=True) if mode["renormalize"] else u)
    f = torch.nn.functional.one_hot(ids, E).sum((0, 1)).to(z.dtype) / T
    P = (s / s.sum(-1, keepdim=True)).mean(0)
    aux = mode.get("balance_loss_weight", 0) * E * (f * P).sum()
    return w, ids, aux + mode.get("z_loss_weight", 0) * z.logsumexp(-1).square().mean()


def oracle(c: Tensor, K: int, mode: dict[str, Any]) -> Tensor:
    """The K largest, lowest index first among equals; only in the best groups."""
    E = c.shape[1]
    chosen = []
    for row in c.tolist():
        allowed = range(E)
        if "num_groups" in mode:
            width = E // mode["num_groups"]
            groups = [sorted(row[g : g + width], reverse=True) for g in range(0, E, width)]
            worth = [sum(g[:2]) if mode["group_score"] == "top2_sum" else g[0] for g in groups]
            best = sorted(range(len(groups)), key=lambda g: (-worth[g], g))[: mode["top_groups"]]
            allowed = [e for e in range(E) if e // width in best]
        chosen.append(sorted(allowed, key=lambda e: (-row[e], e))[:K])
    return torch.tensor(chosen).reshape(len(chosen), K)


def with_groups(mode: dict[str, Any], num_groups: int, top_groups: int) -> dict[str, Any]:
    if "group_score" not in mode:
        return mode
    return {**mode, "num_groups": num_groups, "top_groups": top_groups}


def route(z: Tensor, K: int, mode: dict[str, Any], bias: Tensor | None, backend: str) -> Routing:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return moe_route(z, K, selection_bias=bias, backend=backend, **mode)


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


def test_only_one_of_the_outputs_used(backend, device) -> None:
    """Weights alone, losses alone, and their sum: the gradients add up."""
    z = torch.randn(9, 8, device=device, requires_grad=True)
    routing = moe_route(z, 2, backend=backend, **LOSSES)
    pull = torch.randn(9, 2, device=device)
    parts = (routing.weights * pull).sum(), routing.aux_loss
    grads = [torch.autograd.grad(part, z, retain_graph=True)[0] for part in parts]
    (both,) = torch.autograd.grad(sum(parts), z)
    torch.testing.assert_close(both, grads[0] + grads[1])
    assert grads[1].abs().max() > 0


def test_only_the_logits_get_a_gradient(backend, device) -> None:
    z = torch.randn(3, 4, device=device)
    bias = torch.zeros(4, device=device, requires_grad=True)
    routing = moe_route(z, 2, selection_bias=bias, backend=backend)
    assert not routing.weights.requires_grad
    routing = moe_route(z.requires_grad_(), 2, selection_bias=bias, backend=backend)
    assert routing.weights.requires_grad
    assert not routing.counts.requires_grad
    routing.weights.sum().backward()
    assert bias.grad is None


def test_saved_bytes_follow_the_table(backend, device) -> None:
    """A router without losses keeps no [T, E] alive: renormalised softmax saves w and ids only."""
    z = torch.randn(32, 64, device=device, requires_grad=True)

    def saved(**options: Any) -> int:
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
            moe_route(z, 2, backend=backend, **options)
        return sum(x.numel() * x.element_size() for x in seen)

    slots = 32 * 2
    assert saved(renormalize=True) == slots * (4 + 8) + 64 * 8
    assert saved(score="sigmoid") == slots * (4 + 4 + 8) + 64 * 8
    assert saved() == slots * (4 + 8) + 64 * 8 + 32 * 64 * 4 + 32 * 4


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


def test_non_contiguous_logits(backend, device) -> None:
    z = torch.randn(8, 30, device=device).t().requires_grad_()
    bias = torch.randn(16, device=device)[::2]
    ours = moe_route(z, 3, selection_bias=bias, backend=backend, **LOSSES)
    again = moe_route(z.contiguous(), 3, selection_bias=bias, backend=backend, **LOSSES)
    assert all(map(torch.equal, ours, again))
    # expanded gradients have stride 0
    grads = [torch.autograd.grad(r.weights.sum() + r.aux_loss, z)[0] for r in (ours, again)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("score", ("softmax", "sigmoid"))
def test_same_bits_on_any_number_of_threads(score, backend, device) -> None:
    z = torch.randn(3000, 20, device=device, requires_grad=True)
    runs, threads = [], torch.get_num_threads()
    for count in (1, 2, 1, 2):
        torch.set_num_threads(count)
        routing = moe_route(z, 3, score=score, backend=backend, **LOSSES)
        (grad,) = torch.autograd.grad(routing.weights.square().sum() + routing.aux_loss, z)
        runs.append((*routing, grad))
    torch.set_num_threads(threads)
    if backend != "reference":
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_double_backward_is_refused(backend, device) -> None:
    z = torch.randn(3, 4, device=device, requires_grad=True)
    routing = moe_route(z, 2, backend=backend)
    (grad,) = torch.autograd.grad(routing.weights.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_registration(backend, device, monkeypatch) -> None:
    """opcheck of the opaque op with what the door really hands it."""
    calls = []
    monkeypatch.setattr(op, "_route", lambda *args: calls.append(args) or (None,) * 7)
    for case in CATALOG[STEM].cases:
        if case.quick:
            moe_route(**case.make(device, torch.float32, 0), backend=backend)
    assert len(calls) == 3
    for arguments in calls:
        torch.library.opcheck(torch.ops.deepfusion.moe_route.default, arguments)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_as_one_graph(dynamic, backend, device) -> None:
    torch._dynamo.reset()

    def step(z: Tensor) -> tuple[Tensor, Tensor]:
        routing = moe_route(z, 2, num_groups=2, top_groups=1, backend=backend, **LOSSES)
        return routing.weights.square().sum() + routing.aux_loss, routing.experts

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (5, 9):
        z = torch.randn(T, 6, device=device, requires_grad=True)
        (ours, ids), (plain, plain_ids) = compiled(z), step(z)
        assert torch.equal(ids, plain_ids)
        torch.testing.assert_close(ours, plain)
        grads = [torch.autograd.grad(out, z)[0] for out in (ours, plain)]
        assert torch.equal(*grads)


BAD = (
    ({"top_k": 0}, r"top_k must be within 1 .. 8, got 0"),
    ({"top_k": 9}, r"top_k must be within 1 .. 8, got 9"),
    ({"top_k": 5, "num_groups": 4, "top_groups": 2}, r"top_k must be within 1 .. 4, got 5"),
    ({"score": "tanh"}, r"score must be one of 'softmax', 'sigmoid', got 'tanh'"),
    ({"order": "topk"}, r"order must be one of"),
    ({"group_score": "sum"}, r"group_score must be one of"),
    ({"scale": 0.0}, r"scale must be finite and not 0, got 0.0"),
    ({"scale": NAN}, r"scale must be finite and not 0, got nan"),
    ({"z_loss_weight": INF}, r"z_loss_weight must be finite, got inf"),
    ({"num_groups": 4}, r"num_groups and top_groups must be given both or neither"),
    ({"num_groups": 3, "top_groups": 1}, r"num_groups must be a divisor of E = 8, got 3"),
    ({"num_groups": 4, "top_groups": 5}, r"top_groups must be within 1 .. 4, got 5"),
    (
        {"num_groups": 8, "top_groups": 8, "group_score": "top2_sum"},
        r"group_score must be 'max' where a group has fewer than 2 experts",
    ),
    ({"selection_bias": torch.zeros(7)}, r"selection_bias must be \[E\] = \[8\], got \[7\]"),
    ({"selection_bias": torch.zeros(8).long()}, r"selection_bias must have dtype"),
)


@pytest.mark.parametrize(
    "options, message", BAD, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_bad_input_is_named(options, message) -> None:
    with pytest.raises(ValueError, match="moe_route: " + message):
        moe_route(torch.zeros(3, 8), **{"top_k": 2, **options})


def test_bad_logits_are_named() -> None:
    with pytest.raises(ValueError, match=r"moe_route: router_logits must be \[T, E\], got \[8\]"):
        moe_route(torch.zeros(8), 2)
    with pytest.raises(ValueError, match=r"moe_route: router_logits must have dtype .*, got int64"):
        moe_route(torch.zeros(3, 8).long(), 2)
