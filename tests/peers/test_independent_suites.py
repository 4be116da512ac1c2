"""Other projects' own tests of a divergence, from their checkouts, run on our doors.

DEEPFUSION_PEERS names a folder with checkouts Liger-Kernel and trl; both must be importable
(requirements/bench.txt). Liger's functional tests of its Triton kernel are left out: they compare
it with itself. TRL's test of reduction "none" too: it wants a value a column, ours are one a token.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITES = {
    "liger-fused": (
        "Liger-Kernel", "liger_kernel", "liger_plugin",
        "test/transformers/test_fused_linear_jsd.py",
        "(test_correctness or test_correctness_with_ignore_index) and not functional",
        32,
    ),
    "liger-chunked": (
        "Liger-Kernel", "liger_kernel", "liger_plugin", "test/chunked_loss/test_jsd_loss.py",
        "test_correctness",
        64,
    ),
    "trl-jsd": (
        "trl", "trl", "trl_plugin", "tests/experimental/test_gkd_trainer.py",
        "TestGeneralizedJSDLoss and not reduction_methods",
        7,
    ),
}  # fmt: skip


@pytest.mark.parametrize("suite", SUITES)
def test_their_suite_passes_on_our_doors(suite: str) -> None:
    checkout, package, plugin, file, chosen, least = SUITES[suite]
    home = os.environ.get("DEEPFUSION_PEERS")
    if home is None:
        pytest.skip("DEEPFUSION_PEERS does not name a folder with checkouts of the peers")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -r requirements/bench.txt")
    folder = Path(home) / checkout
    if not (folder / file).exists():
        pytest.skip(f"no checkout: {folder / file}")
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", plugin, file, "-k", chosen]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) >= least, done.stdout[-2000:]
