"""Device code without a device: Triton compiled for four targets, CUDA objects inspected."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deepfusion_kernels
from deepfusion_kernels import _native
from deepfusion_kernels._triton import HAS_TRITON, triton
from deepfusion_kernels.catalog import CATALOG
from tests.aot import SHARED_LIMIT, shipped_of

ROOT = Path(__file__).parents[2]
WITH_TRITON = [stem for stem in CATALOG if "triton" in CATALOG[stem].impls]
WIDE_SUMS = r"flash_forward_kernelI.*Li128E|small_backward_kernelI.*Li64E"
ATTENTION = r"(?:flash|small)_(?:for|back)ward_kernelI(f|6__half|13__nv_bfloat16)L"
WITH_CUDA = [stem for stem in CATALOG if "cuda" in CATALOG[stem].impls]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("stem", WITH_TRITON)
def test_triton_kernels_compile_within_their_limits(stem: str, tmp_path: Path) -> None:
    """No spills; registers and shared memory that the target has; tensor cores where promised."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.aot", stem]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for shipped in shipped_of(stem):
        for capability in shipped.targets:
            name = f"{shipped.name}-sm{capability}"
            used = found.pop(name)
            assert used["spilled"] == 0, f"{stem} {name}: {used}"
            assert used["registers"] <= shipped.launch.get("maxnreg", 255), f"{stem} {name}: {used}"
            assert used["shared"] <= SHARED_LIMIT[capability], f"{stem} {name}: {used}"
            assert bool(used["tensor_cores"]) == shipped.tensor_cores, f"{stem} {name}: {used}"
    assert not found


@pytest.mark.skipif(not _native.HAS_CUDA, reason="built without nvcc")
@pytest.mark.parametrize("stem", WITH_CUDA)
def test_cuda_kernels_are_registered(stem: str) -> None:
    """Every native op under the stem's comment has both; those of one device stand apart."""
    names = schemas_of(stem)
    assert names, f"csrc/library.cpp has no schemas under the comment {stem}"
    for name in names:
        for device in ("CPU", "CUDA"):
            full = f"deepfusion_native::{name}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(full, device), (full, device)


def schemas_of(stem: str) -> list[str]:
    """The ops that csrc/library.cpp defines under the comment that names the stem."""
    text = (ROOT / "csrc" / "library.cpp").read_text()
    block = re.search(rf"// {stem}\n(.*?)(?=\n  // |\n\}}\n)", text, re.DOTALL)
    assert block, f"csrc/library.cpp has no comment {stem}"
    return re.findall(r'm\.def\(\s*"(\w+)\(', block[1])


@pytest.mark.skipif(not (_native.HAS_CUDA and HAS_TRITON), reason="built without nvcc")
def test_cuda_objects_use_no_local_memory() -> None:
    """Every kernel in all four targets: no stack (a spill would be one), <= 128 registers.

    The sums of the widest heads leave two kernels of the attention no room within them.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    library = Path(deepfusion_kernels.__file__).with_name("_ops.so")
    command = [tool, "--dump-resource-usage", library]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    targets: dict[str, int] = {}
    for block in dump.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (sm_\w+)", block)
        assert arch, block[:200]
        kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", block)
        for kernel, registers, stack, _ in kernels:
            assert int(stack) == 0, f"{arch[1]} {kernel}: {stack} bytes of stack"
            most = 192 if re.search(WIDE_SUMS, kernel) else 128
            assert int(registers) <= most, f"{arch[1]} {kernel}: {registers} registers"
            targets[arch[1]] = targets.get(arch[1], 0) + 1
    built = {f"sm_{name.removesuffix('-real')}" for name in _native.BUILD["cuda_archs"].split(",")}
    assert set(targets) == built
    assert len(set(targets.values())) == 1, f"kernels by target: {targets}"


@pytest.mark.skipif(not (_native.HAS_CUDA and HAS_TRITON), reason="built without nvcc")
def test_attention_multiplies_on_tensor_cores() -> None:
    """Every kernel of two-byte floats, and none of float32; of one target, as the tool is slow."""
    target = f"sm_{_native.BUILD['cuda_archs'].split(',')[0].removesuffix('-real')}"
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    library = Path(deepfusion_kernels.__file__).with_name("_ops.so")
    command = [tool, "-arch", target, "--dump-sass", library]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = {name.split()[0]: name.count("HMMA") for name in dump.split("Function : ")[1:]}
    found = {True: 0, False: 0}
    for name, products in kernels.items():
        kind = re.search(
            r"(?:flash|small)_(?:for|back)ward_kernelI(f|6__half|13__nv_bfloat16)L", name
        )
        if kind:
            assert (products > 0) == (kind[1] != "f"), f"{name}: {products} products"
            found[kind[1] == "f"] += 1
    assert found == {True: 18, False: 48}
