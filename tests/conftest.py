"""Fixtures of every test: backends, devices, the interpreter, memory that is never zero."""

import os

import torch

if not torch.cuda.is_available():
    # before the first import of triton: kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest

from deepfusion_kernels import _native
from deepfusion_kernels._triton import HAS_TRITON, INTERPRETED

if HAS_TRITON and INTERPRETED:
    import tests.triton_interpreter  # noqa: F401

HAS_GPU = torch.cuda.is_available()
# tested in a file of their own, whose BACKENDS names them: the interpreter wants smaller sizes,
# tensor cores heads of whole tiles
APART = {
    "fused_linear_kl": ("triton",),
    "moe_experts": ("triton", "torch", "quack"),
    "view_aligned_attention": ("triton", "cuda"),
    "fused_linear_mse": ("triton", "cuda"),
}
REAL_TEXT = Path(
    os.environ.get("DEEPFUSION_REAL_TEXT", Path(__file__).parents[2] / "shared" / "data")
)


def why_not(backend: str) -> str | None:
    """Why a backend cannot be tested on this machine, or None."""
    if backend == "cpu" and not _native.HAS_CPU:
        return "cpu: the native library was not built"
    if backend == "cuda" and not (HAS_GPU and _native.HAS_CUDA):
        return "cuda: no NVIDIA GPU, or built without nvcc"
    if backend == "triton" and not (HAS_TRITON and (HAS_GPU or INTERPRETED)):
        return "triton: not installed"
    return None


def device_for(backend: str) -> torch.device:
    """Where a backend's tensors live: without a GPU Triton runs interpreted on the CPU."""
    return torch.device("cuda" if HAS_GPU and backend in ("cuda", "triton", "torch") else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` runs for each of its STEM's, or for its module's BACKENDS."""
    if "backend" in metafunc.fixturenames:
        from deepfusion_kernels.catalog import CATALOG

        stem = metafunc.module.STEM
        every = [name for name in CATALOG[stem].impls if name not in APART.get(stem, ())]
        backends = getattr(metafunc.module, "BACKENDS", every)
        metafunc.parametrize("backend", backends, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    reason = why_not(request.param)
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    return device_for(backend)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty is NaN-filled, so that a forgotten store shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def real_text() -> Path:
    if not REAL_TEXT.is_dir():
        pytest.skip(f"real text is absent: no folder {REAL_TEXT}; set DEEPFUSION_REAL_TEXT")
    return REAL_TEXT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Ends the run by naming what was not checked."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"NOT CHECKED ({count}): {reason.removeprefix('Skipped: ')}")
