"""The server under torchrun: two gloo processes learn what one learns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepfusion.checkpoints import load_state
from deepfusion.cli import main
from deepfusion.metrics import Recorder
from deepfusion.server.shard import ranks
from tests.driver import sharded_training
from tests.driver.test_pipeline import ROOT, TINY
from tests.driver.tiny import assert_same

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*TORCHRUN, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_one_process_is_alone() -> None:
    assert ranks("cpu").size == 1
    assert ranks("cpu").part(torch.arange(3)).tolist() == [0, 1, 2]


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    """Features, KL, router supervision, clipping, both optimisers; a head of its own or tied; and
    a batch that cannot be shared out is refused; killed and begun again, the same bits."""
    sharded_training.main(tmp_path)
    done = torchrun("tests.driver.sharded_training", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    for optimizer in sharded_training.OPTIMIZERS:
        losses = [
            [line["loss"] for line in Recorder(tmp_path / f"{optimizer}-{size}.jsonl").lines(stage)]
            for size in (1, 2)
            for stage in ("direct.views", "direct")
        ]
        assert [len(one) for one in losses] == [2, sharded_training.STEPS] * 2
        # sums in another order: a few units in the last place at first, more after every step
        torch.testing.assert_close(losses[2:], losses[:2], rtol=1e-4, atol=0.0)
        (one, _), (two, _) = (
            load_state(tmp_path / f"{optimizer}-{size}.safetensors") for size in (1, 2)
        )
        before = sharded_training.start(optimizer).state_dict()
        assert one.keys() == two.keys() == before.keys()
        # Muon's products are bfloat16: what they make of a gradient's last bits is not small
        bound = {"muon": 0.03, "adamw": 1e-3}[optimizer]
        assert (tmp_path / "refusal.txt").read_text() == (
            "shard: batch_size must be a multiple of the 2 processes, got 3"
        )
        for name in one:
            moved = (one[name] - before[name]).norm()
            assert (two[name] - one[name]).norm() <= bound * moved, name
        assert_same(load_state(tmp_path / f"{optimizer}-2-resumed.safetensors")[0], two)
    assert not list(tmp_path.glob("*-of-2.safetensors"))


@pytest.fixture(scope="module")
def both_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "tiny.toml").write_text("")
    given = [
        f"--set={one}" for one in (*TINY, "controls.dense=false", "controls.centralised=false")
    ]
    for name in ("one", "two"):
        arguments = [
            "run",
            str(folder / "tiny.toml"),
            *given,
            f"--set=run.output='{folder / name}'",
        ]
        if name == "one":
            assert main(arguments) == 0
        else:
            done = torchrun("deepfusion.cli", *arguments)
            assert done.returncode == 0, done.stderr[-3000:]
    return folder / "one", folder / "two"


def test_students_are_the_same_bits_and_the_mixture_is_close(both_runs: tuple[Path, Path]) -> None:
    one, two = both_runs
    for index in range(2):
        student = f"students/{index}.safetensors"
        assert_same(load_state(one / student)[0], load_state(two / student)[0])
    scores = [
        json.loads((run / "evaluation.json").read_text())["models"]["moe"]["nll"]
        for run in both_runs
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_what_every_process_recorded_reaches_the_run(both_runs: tuple[Path, Path]) -> None:
    found = [
        {(line["stage"], line["step"]) for line in Recorder(run / "metrics.jsonl").lines()}
        for run in both_runs
    ]
    assert found[0] == found[1]
