"""What a benchmark row says: error against float64, who refused, the inputs that were asked for."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, peers
from benchmarks.inputs import varied
from benchmarks.run import baselines_of, cases_of, parse
from deepfusion_kernels.bench.accuracy import error_against, outputs_and_gradients, truth_of
from deepfusion_kernels.bench.runner import measure
from deepfusion_kernels.cases import Case
from deepfusion_kernels.catalog import CATALOG

CPU = torch.device("cpu")


def small(stem: str, **changed: Any) -> Case:
    return replace(CATALOG[stem].cases[0], **changed)


def logits_case(T: int, V: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        student, teacher = torch.randn(2, T, V, generator=torch.Generator().manual_seed(seed))
        return {
            "student_logits": student.to(dtype).requires_grad_(),
            "teacher_logits": teacher.to(dtype),
        }

    return Case("made", "kl_distillation", make, lambda size: 1, 1)


def test_error_is_that_of_the_worst_gradient() -> None:
    exact = [torch.tensor([1.0, 4.0]).double(), torch.tensor([2.0]).double()]
    assert error_against(exact, [torch.tensor([1.0, 4.0]), torch.tensor([2.5])]) == 0.25
    assert error_against(None, exact) is None
    assert error_against(exact, exact[:1]) is None


def test_error_tells_a_right_peer_from_a_wrong_one() -> None:
    case = logits_case(6, 50)

    def wrong(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return 1.01 * baselines.eager_kl_distillation(student_logits, teacher_logits)

    def absent(**arguments: Tensor) -> Tensor:
        raise ImportError("no such package")

    rivals = {"eager": baselines.eager_kl_distillation, "wrong": wrong, "absent": absent}
    found = measure("kl_distillation", case, CPU, torch.float32, rivals, repeats=1)
    errors = {row.variant: row.error for row in found.rows}
    assert errors["eager"] is not None
    assert errors["eager"] < 1e-5
    assert errors["wrong"] == pytest.approx(0.01, rel=1e-3)
    assert found.refused == {"absent": "ImportError: no such package"}
    assert found.shapes == {"student_logits": [6, 50], "teacher_logits": [6, 50]}


def test_what_depends_on_an_input_wants_no_gradient() -> None:
    """A teacher made from the student is data; else its gradient would be timed, and be wrong."""
    plain = logits_case(6, 50)

    def entangled(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        made = plain.make(device, dtype, seed)
        return {**made, "teacher_logits": made["student_logits"] + 1e-1 * made["teacher_logits"]}

    rivals = {"eager": baselines.eager_kl_distillation}
    case = replace(plain, make=entangled)
    found = measure("kl_distillation", case, CPU, torch.float32, rivals, repeats=1)
    assert max(row.error or 0 for row in found.rows) < 1e-4


def test_baselines_of_a_plan_and_what_follows_it_agree() -> None:
    """A plan is a named tuple: the truth in float64 rebuilds it."""
    T, D, E, K = 30, 6, 4, 2
    experts = torch.rand(T, E).topk(K).indices
    arguments: dict[str, Any] = {"experts": experts, "num_experts": E}
    doors = CATALOG["moe_dispatch"].doors
    plan = doors["moe_plan"](**arguments)
    for ours, theirs in zip(plan[:2], baselines.eager_moe_plan(**arguments), strict=False):
        assert torch.equal(ours, theirs)
    hidden = torch.randn(T, D).requires_grad_()
    rows, weights = torch.randn(T * K, D).requires_grad_(), torch.rand(T, K).requires_grad_()
    for door, given in (
        ("moe_dispatch", {"hidden": hidden, "plan": plan}),
        ("moe_combine", {"rows": rows, "plan": plan, "weights": weights}),
    ):
        truth = truth_of(doors[door], given)
        for function in (doors[door], baselines_of(door, compiled=False)["eager"]):
            found = outputs_and_gradients(function, given)
            assert error_against(truth, found[0] + found[1]) < 1e-6


@pytest.mark.parametrize("compiled", [False, True])
def test_a_peer_serves_its_own_door_alone(compiled: bool) -> None:
    more = {"torch.compile"} if compiled else set()
    assert baselines_of("kl_distillation", compiled).keys() == {"eager", "liger"} | more
    fused = baselines_of("fused_linear_kl_distillation", compiled).keys()
    assert fused == {"eager", "trl", "liger"} | more
    experts = {"eager", "grouped_mm", "compiled_grouped_mm", "liger", "quack"}
    assert baselines_of("moe_experts", compiled).keys() == experts | more


def test_truth_keeps_the_rounded_inputs() -> None:
    case = logits_case(3, 7)
    arguments = case.make(CPU, torch.bfloat16, 0)
    door = CATALOG["kl_distillation"].doors["kl_distillation"]
    truth = truth_of(door, arguments)
    assert truth is not None
    assert {tensor.dtype for tensor in truth} == {torch.float64}
    outputs, gradients = outputs_and_gradients(door, arguments)
    assert [t.shape for t in outputs + gradients] == [t.shape for t in truth]


@pytest.mark.parametrize("std", [1.0, 10.0])
@pytest.mark.parametrize("teacher", ["near", "far"])
def test_varied_logits(std: float, teacher: str) -> None:
    case = varied(logits_case(64, 200), std, teacher, 0.5)
    assert case.name == f"made-std{std:g}-{teacher}-masked0.5"
    made = case.make(CPU, torch.float32, 0)
    student, given = made["student_logits"], made["teacher_logits"]
    assert student.requires_grad
    assert not given.requires_grad
    assert float(student.std()) == pytest.approx(std, rel=1e-3)
    likeness = float(torch.corrcoef(torch.stack([student.flatten(), given.flatten()]))[0, 1])
    assert likeness > 0.99 if teacher == "near" else abs(likeness) < 0.05
    assert 0.3 < float((made["labels"] == -100).float().mean()) < 0.7


def test_varied_heads() -> None:
    big = next(case for case in CATALOG["fused_linear_kl"].cases if "V32000" in case.name)
    made = varied(big, 10.0, "near", None).make(CPU, torch.float32, 0)
    logits = made["student_hidden"][:64] @ made["student_weight"].T
    teacher = made["teacher_hidden"][:64] @ made["teacher_weight"].T
    assert float(logits.std()) == pytest.approx(10.0, rel=0.05)
    assert float((teacher - logits).std()) == pytest.approx(1.0, rel=0.05)
    assert made["student_weight"].requires_grad
    assert not made["teacher_weight"].requires_grad


def test_varied_inputs_are_for_the_losses_alone() -> None:
    case = varied(small("moe_experts"), 1.0, None, None)
    with pytest.raises(ValueError, match="for the distillation losses"):
        case.make(CPU, torch.float32, 0)
    plain = small("moe_experts")
    assert varied(plain, None, None, None) is plain


@pytest.mark.parametrize("peer", ["trl", "liger"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_optional_peers_compute_the_same(peer: str, divergence: str) -> None:
    package = {"trl": "trl.kernels.chunked_divergence", "liger": "liger_kernel.chunked_loss"}[peer]
    pytest.importorskip(package, reason=f"{peer}: not installed (requirements/bench.txt)")
    torch.manual_seed(0)
    arguments = {
        "student_hidden": torch.randn(7, 8, requires_grad=True),
        "student_weight": torch.randn(33, 8, requires_grad=True),
        "teacher_hidden": torch.randn(7, 6),
        "teacher_weight": torch.randn(33, 6),
        "divergence": divergence,
    }
    door = CATALOG["fused_linear_kl"].doors["fused_linear_kl_distillation"]
    outputs, gradients = outputs_and_gradients(
        getattr(peers, f"{peer}_fused_linear_kl_distillation"), arguments
    )
    error = error_against(truth_of(door, arguments), outputs + gradients)
    assert error is not None
    assert error < 1e-4


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("joined-pat-conv", ["joined-pat-conv"]),
        ("pat-conv", ["joined-pat-conv", "joined-pat-conv-causal", "joined-pat-conv-padded"]),
        ("no such case", []),
    ],
)
def test_a_whole_name_is_that_case_alone(word: str, names: list[str]) -> None:
    cases = cases_of("view_aligned_attention", parse(["--case", word]))
    assert [case.name for case in cases] == names
