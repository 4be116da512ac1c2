"""What a wheel and a source distribution hold, and that without a compiler the package is whole."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_COMPILER = {**os.environ, "CXX": "/no/such/compiler"}


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """What git tracks, as it stands in the tree."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture
def source(tmp_path: Path, tracked: list[str]) -> Path:
    """The tree of a clone, without its history."""
    for name in tracked:
        copy = tmp_path / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    return tmp_path / "source"


def python_files(names: list[str]) -> set[str]:
    return {name for name in names if name.startswith("deepfusion") and name.endswith(".py")}


@pytest.mark.slow
def test_wheel_without_a_compiler(source: Path, tmp_path: Path, tracked: list[str]) -> None:
    """Pure Python and says so; what an earlier build left behind is not packed."""
    folder = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for left in (f"{folder}/deepfusion/renamed.py", "deepfusion_kernels/_ops.so"):
        (source / left).parent.mkdir(parents=True, exist_ok=True)
        (source / left).write_text("of an earlier build")
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        env=NO_COMPILER,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no C++ compiler found" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("deepfusion_moe-")
    names = zipfile.ZipFile(wheel).namelist()
    assert python_files(names) == python_files(tracked)
    assert {"deepfusion/py.typed", "deepfusion_kernels/py.typed"} <= set(names)
    assert not [name for name in names if name.endswith(".so")]
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"deepfusion", "deepfusion_kernels"}


@pytest.mark.slow
def test_source_distribution_can_be_built_from(
    source: Path, tmp_path: Path, tracked: list[str]
) -> None:
    """Every source of the native library is in it, and nothing that git does not track."""
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=source,
        capture_output=True,
        text=True,
        env=NO_COMPILER,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name.startswith("deepfusion_moe-")
    with tarfile.open(archive) as opened:
        names = {one.name.partition("/")[2] for one in opened if one.isfile()}
    needed = {"setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"}
    needed |= {name for name in tracked if name.startswith(("csrc/", "deepfusion"))}
    assert needed - names == set()
    made = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert names - made - set(tracked) == set()
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.parametrize(
    "gpu, built, cuda", [("", "", "OFF"), ("/dev/nvidiactl", "", "AUTO"), ("", "build", "AUTO")]
)
def test_demo_compiles_cuda_only_for_a_gpu(tmp_path: Path, gpu: str, built: str, cuda: str) -> None:
    """Without one CUDA and other processors are left out, unless the tree was built whole
    before."""
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    for name in ("csrc", "requirements", "CMakeLists.txt", "setup.py", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".stamps").mkdir()
    if built:
        (tmp_path / ".stamps" / built).touch()
        os.utime(tmp_path / ".stamps" / built, (0, 0))
    planned = subprocess.run(
        ["make", "-n", "demo", f"GPU={gpu}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MAKEFLAGS": ""},
    ).stdout
    assert planned.count("-DDF_WITH_CUDA=") == 1
    assert f"-DDF_WITH_CUDA={cuda} -DDF_LEVELS={'native' if cuda == 'OFF' else ''} " in planned
