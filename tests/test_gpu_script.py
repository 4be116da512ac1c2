"""`make gpu` without a GPU: what it calls, that failures do not stop it, what its exit code says.

The interpreter is a stand-in that notes its arguments and fails where it is told to; what each call
does on a GPU is not tested here.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from deepfusion_kernels.catalog import STEMS

ROOT = Path(__file__).parents[1]
STAND_IN = """#!/bin/sh
echo "$*" >> "$CALLS"
[ "$1" = - ] && cat > /dev/null
case "$*" in
  *"$FAILS"*) echo "stand-in fails"; exit 3 ;;
  *tables.py*) echo "the short table" ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the script reads of the repository."""
    for name in ("deepfusion_kernels", "tests", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    return tmp_path


def make_gpu(tree: Path, fails: str = "nothing", **variables: str) -> tuple[int, str, list[str]]:
    """Exit code, output, the calls of the interpreter."""
    calls = tree / "calls"
    calls.write_text("")
    done = subprocess.run(
        ["make", "-s", "gpu", f"PY={tree / 'python'}", *(f"{k}={v}" for k, v in variables.items())],
        cwd=tree,
        capture_output=True,
        text=True,
        env={**os.environ, "CALLS": str(calls), "FAILS": fails, "MAKEFLAGS": ""},
    )
    # make itself answers 2 where a recipe fails, and says the recipe's own code
    code = done.returncode and int(done.stderr.rsplit("Error ", 1)[1].split()[0])
    return code, done.stdout, calls.read_text().splitlines()


def test_all_green_ends_with_the_table(tree: Path) -> None:
    code, output, calls = make_gpu(tree)
    assert code == 0
    assert output.splitlines()[-2:] == ["make gpu: all green", "the short table"]
    assert calls[:3] == ["-", "setup.py --quiet build_ext --inplace", "-m deepfusion_kernels"]
    tested = {call.removeprefix("-m pytest -q ") for call in calls if "pytest" in call}
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "tests/ops").glob("test_*.py")}
    assert expected | {"tests/test_patching.py"} <= tested
    timed = [call.split()[-1] for call in calls if "run.py" in call]
    assert sorted(timed) == sorted(STEMS)


@pytest.mark.parametrize("fails", ["tests/ops/test_moe_dispatch.py", "--op topk_kl", "tables.py"])
def test_a_failure_does_not_stop_the_rest(tree: Path, fails: str) -> None:
    code, output, calls = make_gpu(tree, fails)
    assert code == 1
    assert "FAILED with code 3" in output
    assert calls == make_gpu(tree)[2]


def test_without_a_gpu_or_a_build_nothing_is_run(tree: Path) -> None:
    code, _, calls = make_gpu(tree, "-")
    assert code == 2
    assert calls == ["-"]
    code, output, calls = make_gpu(tree, "setup.py")
    assert code == 1
    assert "build FAILED with code 3" in output
    assert len(calls) == 2


def test_ops_and_parts_limit_what_runs(tree: Path) -> None:
    _, _, calls = make_gpu(tree, OPS="moe_experts topk_kl", PARTS="test")
    tested = [call.split()[-1] for call in calls if "pytest" in call]
    assert "tests/ops/test_topk_kl.py" in tested
    assert {"tests/ops/test_topk_logprobs.py", "tests/ops/test_kl_gpu.py"} <= set(tested)
    for name in tested:
        stems = re.search("^STEMS? = .*$", (ROOT / name).read_text(), re.MULTILINE)
        assert stems, name
        assert "moe_experts" in stems[0] or "topk_kl" in stems[0]
    assert not [call for call in calls if "benchmarks" in call]
    _, _, calls = make_gpu(tree, OPS="moe_experts", PARTS="bench")
    assert [call for call in calls if "benchmarks" in call] == [
        "benchmarks/run.py --dtype bfloat16 --op moe_experts",
        "benchmarks/tables.py --short",
    ]


@pytest.mark.parametrize("variables", [{"OPS": "moe_expert"}, {"PARTS": "tests"}])
def test_a_misspelt_word_is_refused(tree: Path, variables: dict[str, str]) -> None:
    code, output, calls = make_gpu(tree, **variables)
    assert code == 2
    assert "must be" in output
    assert calls == []
