"""Importing registers ops and nothing else; without compiler or Triton the package is whole."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "", **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_leaves_no_trace() -> None:
    """No thread setting, no logging handler, no transformers, no distributed initialisation."""
    code = """
import json, logging, sys, torch
before = torch.get_num_threads(), len(logging.getLogger().handlers), torch.get_default_dtype()
import deepfusion_kernels
after = torch.get_num_threads(), len(logging.getLogger().handlers), torch.get_default_dtype()
heavy = [name for name in ("transformers", "datasets", "sklearn") if name in sys.modules]
print(json.dumps([before == after, heavy, torch.cuda.is_initialized()]))
"""
    assert json.loads(run(code)) == [True, [], False]


@pytest.mark.parametrize("missing", ["triton", "deepfusion_kernels._C"])
def test_whole_without(missing: str) -> None:
    """Blocked from importing Triton or the native library, every op still runs."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
import torch
from deepfusion_kernels.catalog import CATALOG
for op in CATALOG.values():
    case = next(case for case in op.cases if case.quick)
    arguments = case.make(torch.device("cpu"), torch.float32, 0)
    result = op.doors[case.door](**arguments)
    assert result is not None, op.stem
    print(op.stem)
"""
    from deepfusion_kernels.catalog import STEMS

    assert run(code).split() == list(STEMS)


def test_unknown_preference_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt DEEPFUSION_BACKEND must not quietly mean the automatic choice."""
    import torch

    from deepfusion_kernels import backends

    impls = {"reference": ModuleType("reference")}
    assert backends.choose(None, torch.empty(1), impls) == "reference"
    monkeypatch.setattr(backends, "PREFERRED", "tritn")
    with pytest.raises(ValueError, match="DEEPFUSION_BACKEND must be one of"):
        backends.choose(None, torch.empty(1), impls)


def test_a_build_for_a_better_processor_is_not_taken() -> None:
    """As DF_LEVELS=native leaves it when the folder moves to an older machine."""
    pytest.importorskip("deepfusion_kernels._C")
    code = """
import torch
from deepfusion_kernels import _C, kl_distillation
real = _C.build_info()
_C.build_info = lambda: {**real, "cpu_levels": "sve", "cpu_level_here": "baseline"}
import importlib
from deepfusion_kernels import _native, backends
importlib.reload(_native)
logits = torch.randn(2, 3)
print(kl_distillation(logits, logits).item())
try:
    kl_distillation(logits, logits, backend="cpu")
except NotImplementedError as error:
    print(error)
"""
    zero, refusal = run(code).splitlines()
    assert float(zero) == pytest.approx(0, abs=1e-6)
    assert "built for sve, this processor is baseline; build again here" in refusal


def test_main_names_every_op_and_backend() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deepfusion_kernels"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    from deepfusion_kernels.catalog import CATALOG

    for op in CATALOG.values():
        assert op.stem in done.stdout
    assert done.stdout.count("taken") >= len(CATALOG)
