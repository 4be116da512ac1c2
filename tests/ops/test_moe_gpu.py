"""moe_experts on a GPU: every configuration, graphs, synchronisation, large offsets, races."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion_kernels import backends, moe_experts
from deepfusion_kernels.catalog import CATALOG
from deepfusion_kernels.ops.moe_experts import triton_impl
from deepfusion_kernels.ops.moe_experts.triton_tiles import (
    COPIED,
    FLOAT32,
    FLOAT32_FEW,
    TARGETS,
    Config,
    describe,
    target,
    using,
)
from tests.ops.captured_graph import assert_a_captured_graph_follows
from tests.ops.moe_experts_inputs import ACTIVATIONS, NAMES, compare, make, run

# `make gpu OPS=...` runs the file for it
STEMS = ("moe_experts",)
pytestmark = pytest.mark.gpu
CHOSEN = ("triton", "torch")


def configurations() -> dict[str, Config]:
    """Those of this device: by rows an expert, rows gathered or copied, by TMA or by pointers."""
    if not torch.cuda.is_available():
        return {"none": FLOAT32}
    capability, _ = describe(torch.device("cuda", 0))
    found = {}
    for config in TARGETS[target(capability)]:
        found[f"{config.rows}-gathered"] = config
        found[f"{config.rows}-pointers"] = config._replace(descriptors=False)
        found[f"{config.rows}-copied"] = config._replace(gathers=False, descriptors=False)
    if capability[0] in (9, 10, 11):
        found["128-copied-descriptors"] = COPIED
    return found


CONFIGURATIONS = configurations()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_within_budget(name: str, activation: str) -> None:
    """Whole tiles, tails of tiles, an empty expert, sentinels; several tiles of all widths."""
    inputs = make(700, 576, 384, 5, 3, torch.bfloat16, device="cuda")
    inputs["experts"][inputs["experts"] == 3] = 1
    inputs["experts"][::7, 1] = -1
    with using(CONFIGURATIONS[name]):
        compare(inputs, "triton", activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "T, D, F, E, K",
    [(1, 2048, 768, 128, 8), (16, 1024, 512, 60, 4), (300, 333, 101, 7, 3), (2000, 256, 192, 8, 2)],
)
def test_shapes_within_budget(dtype: torch.dtype, T: int, D: int, F: int, E: int, K: int) -> None:
    compare(make(T, D, F, E, K, dtype, device="cuda"), "triton")


@pytest.mark.parametrize("config", [FLOAT32, FLOAT32_FEW], ids=["many", "few"])
def test_float32_is_exact_unless_allowed_otherwise(config: Config) -> None:
    inputs = make(200, 256, 192, 3, 2, torch.float32, device="cuda")
    dout = torch.randn(200, 256, device="cuda")
    with using(config):
        compare(inputs, "triton")
        exact = run(moe_experts, inputs, dout, backend="triton")
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            lowered = run(moe_experts, inputs, dout, backend="triton")
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
    for name, value in lowered.items():
        gap = (value - exact[name]).norm() / exact[name].norm()
        assert 0 < gap < 2**-8, name


def calls(chosen: str, T: int = 300) -> tuple[dict[str, Tensor], Any]:
    """Tensors that a call reads, and the call: its output and gradients."""
    inputs = make(T, 256, 192, 8, 2, torch.bfloat16, device="cuda")
    dout = torch.randn_like(inputs["hidden"])
    leaves = [inputs[name] for name in NAMES]

    def call() -> list[Tensor]:
        out = moe_experts(**inputs, backend=chosen)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return inputs, call


@pytest.mark.parametrize("chosen", CHOSEN)
def test_repeated_calls_give_the_same_bits(chosen: str) -> None:
    _, call = calls(chosen, 3000)
    first = call()
    for _ in range(10):
        assert all(torch.equal(one, other) for one, other in zip(call(), first, strict=True))


@pytest.mark.parametrize("T", [1, 300])
def test_no_call_waits_for_the_device(T: int) -> None:
    _, call = calls("triton", T)
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("T", [1, 300])
def test_a_captured_graph_follows_its_inputs(T: int) -> None:
    """Also the ids: the replay routes anew."""
    inputs, call = calls("triton", T)

    def change_inputs() -> None:
        for tensor in inputs.values():
            fresh = torch.randint_like(tensor, 0, 8) if tensor.dtype == torch.int64 else None
            tensor.copy_(torch.randn_like(tensor) if fresh is None else fresh)

    assert_a_captured_graph_follows(call, change_inputs)


def test_offsets_past_two_to_the_31() -> None:
    """R 2F = 2.2e9: tokens of the last expert are those tokens alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    T, D, F, E, K, last = 140_000, 128, 1024, 4, 8, 5
    assert T * K * 2 * F > 2**31
    inputs = make(last, D, F, E, K, torch.bfloat16, device="cuda")
    inputs["experts"].fill_(E - 1)
    many = inputs | {
        "hidden": torch.zeros(T, D, device="cuda", dtype=torch.bfloat16),
        "experts": torch.zeros(T, K, device="cuda", dtype=torch.int64),
        "weights": torch.ones(T, K, device="cuda", dtype=torch.bfloat16),
    }
    for name in ("hidden", "experts", "weights"):
        many[name][-last:] = inputs[name].detach()
    dout = torch.zeros(T, D, device="cuda", dtype=torch.bfloat16)
    dout[-last:] = torch.randn(last, D, device="cuda").bfloat16()
    config = TARGETS[target(describe(torch.device("cuda", 0))[0])][0]
    with using(config):
        whole = run(moe_experts, many, dout, backend="triton")
        alone = run(moe_experts, inputs, dout[-last:], backend="triton")
    for name in ("out", "hidden", "weights"):
        assert torch.equal(whole[name][-last:], alone[name]), name
        assert not whole[name][:-last].any(), name
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(whole[name][-1], alone[name][-1]), name


def test_the_door_takes_triton_and_says_why() -> None:
    triton_impl._tried_once.cache_clear()
    hidden = torch.zeros(2, 8, device="cuda", dtype=torch.bfloat16)
    told = backends.explain(hidden, CATALOG["moe_experts"].impls)
    assert list(told) == ["triton", "torch", "reference"]
    assert told["triton"] is None
    assert backends.choose(None, hidden, CATALOG["moe_experts"].impls) == "triton"
    assert backends.choose(None, hidden.double(), CATALOG["moe_experts"].impls) == "reference"
