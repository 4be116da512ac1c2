"""moe_experts in Triton: its tiles, the ways to fetch rows, the check at first use."""

import pytest
import torch

from deepfusion_kernels import backends, moe_experts
from deepfusion_kernels.catalog import CATALOG
from deepfusion_kernels.ops.moe_experts import (
    reference,
    triton_check,
    triton_impl,
    triton_tiles,
)
from deepfusion_kernels.ops.moe_experts.triton_launch import Launcher
from deepfusion_kernels.ops.moe_experts.triton_tiles import INTERPRETED, Tile, using
from deepfusion_kernels.ops.shared import moe_plan
from tests.ops.moe_experts_inputs import compare, make, run

STEM = "moe_experts"
BACKENDS = ("triton",)
SMALL = Tile(16, 16, 2, 4)
TILES = INTERPRETED._replace(
    rows=16, lines=16, up=SMALL, down=SMALL, dact=SMALL, dx=SMALL, dweight=SMALL
)


@pytest.mark.parametrize("gathers", [True, False], ids=["gathered", "copied"])
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_ways_to_fetch_rows(backend, device, gathers, descriptors, poisoned_memory):
    """Several tiles of everything, sentinels, an empty expert, NaN in another expert's row."""
    inputs = make(12, 32, 24, 3, 2, device=device)
    inputs["experts"].clamp_(max=1)
    inputs["experts"][::3, 1], inputs["experts"][4] = -1, 3
    with using(TILES._replace(gathers=gathers, descriptors=descriptors)):
        compare(inputs, backend)
        inputs["experts"][0], inputs["experts"][1:, :] = 1, inputs["experts"][1:, :].clamp(max=0)
        with torch.no_grad():
            inputs["hidden"][0] = torch.nan
        dout = torch.ones(12, 32, device=device)
        result = run(moe_experts, inputs, dout, backend=backend)
    assert result["gate_up_proj"][1].isnan().all()
    assert result["gate_up_proj"][0].isfinite().all()
    assert result["down_proj"][0].isfinite().all()


def test_tile_map_covers_every_row_once(backend, device):
    experts = torch.tensor([[2, 2], [5, 2], [-1, 5], [2, 7], [2, 5], [0, 2]], device=device)
    for ids in (experts, torch.full_like(experts, -1), torch.full_like(experts, 3)):
        plan = moe_plan.plan(ids, 6)
        with using(TILES._replace(rows=4)):
            launcher = Launcher(torch.empty(6, 2, 1, device=device), "silu", plan)
        expert_M, row_M = launcher.tiles.tolist()
        assert len(expert_M) == 12 // 4 + 6
        counts, wanted = plan.offsets.diff().tolist(), []
        for expert, begin in enumerate(plan.offsets[:-1].tolist()):
            wanted += [(expert, begin + at) for at in range(0, counts[expert], 4)]
        used = len(wanted)
        assert list(zip(expert_M, row_M, strict=True))[:used] == wanted
        assert set(expert_M[used:]) <= {-1}


def test_tiles_of_each_architecture():
    names = {(8, 0): 80, (8, 6): 120, (8, 9): 120, (9, 0): 90, (10, 3): 100, (12, 1): 120}
    assert {each: triton_tiles.target(each) for each in names} == names
    for architecture in triton_tiles.TARGETS:
        rows = [
            triton_tiles.table(architecture, torch.bfloat16, mean).rows for mean in (1, 50, 1024)
        ]
        assert rows == [16, 64, 128]
    assert triton_tiles.table(90, torch.float32, 1024).rows == 64


class TestStartUpCheck:
    """Wrong answers switch Triton off with a warning that tells what was wrong."""

    @pytest.fixture(autouse=True)
    def _untried(self):
        triton_impl._tried_once.cache_clear()
        yield
        triton_impl._tried_once.cache_clear()

    def test_wrong_answers_switch_it_off(self, backend, device, monkeypatch):
        original = triton_impl.forward

        def wrong(*args):
            out, *saved = original(*args)
            return out + 0.1 * out.abs().max(), *saved

        monkeypatch.setattr(triton_impl, "forward", wrong)
        inputs = make(3, 8, 8, 2, 1, device=device)
        with pytest.warns(UserWarning, match="out by .* of its largest value; it is switched off"):
            told = backends.declines("triton", inputs["hidden"], CATALOG[STEM].impls)
        monkeypatch.undo()
        assert told.startswith(f"failed its start-up check on {device}")
        with pytest.raises(NotImplementedError, match="triton: failed its start-up check"):
            moe_experts(**inputs, backend="triton")
        other = {key: each for key, each in CATALOG[STEM].impls.items() if key != "triton"}
        assert backends.choose(None, inputs["hidden"], CATALOG[STEM].impls) in other

    def test_right_answers_are_tried_once(self, monkeypatch):
        calls = []
        monkeypatch.setattr(triton_check, "off", lambda *args: calls.append(args) or "")
        for _ in range(3):
            assert triton_impl.found_wrong("cpu") is None
        assert len(calls) == 1

    def test_a_graph_being_compiled_tries_it(self, backend, device):
        inputs = make(3, 8, 8, 2, 1, device=device)
        torch._dynamo.reset()
        compiled = torch.compile(moe_experts, fullgraph=True, backend="aot_eager")
        out = compiled(**inputs, backend=backend)
        assert triton_impl._tried_once.cache_info().currsize == 1
        assert torch.equal(out, moe_experts(**inputs, backend=backend))

    def test_it_sees_nan(self):
        def nan(*args):
            out, *saved = reference.forward(*args)
            return out * torch.nan, *saved

        told = triton_check.off(torch.device("cpu"), nan, reference.backward)
        assert told.startswith("out by nan")
        assert not triton_check.off(torch.device("cpu"), reference.forward, reference.backward)
