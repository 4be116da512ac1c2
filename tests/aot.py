"""Compiles Triton kernels ahead of time, without a GPU: registers, spills, shared memory as JSON.

`python -m tests.aot STEM` in a process of its own, since in an interpreted one (TRITON_INTERPRET=1)
the device functions that a kernel calls cannot be compiled.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from deepfusion_kernels._triton import triton

# compute capability: bytes of shared memory a block may have
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# how the products of a tile's matrices are spelled on tensor cores
TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
Types = str | tuple[str, ...]


@dataclass(frozen=True)
class Shipped:
    """A kernel as it is launched; `launch` holds num_warps and, as maxnreg, its registers' limit.

    arguments: Triton types by name, "*bf16:16" = divisible by 16, a tuple for a tuple, absent =
    None or a constant given in `constants`.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, Types]
    constants: Mapping[str, Any]
    launch: Mapping[str, int]
    targets: tuple[int, ...] = tuple(SHARED_LIMIT)
    tensor_cores: bool = False


def _source(shipped: Shipped) -> Any:
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    constants: dict[tuple[int, ...], Any] = {}

    def plain(declared: str, path: tuple[int, ...]) -> str:
        kind, _, divisor = declared.partition(":")
        if divisor:
            attributes[path] = [["tt.divisibility", int(divisor)]]
        return kind

    for index, name in enumerate(shipped.kernel.arg_names):
        declared = shipped.arguments.get(name)
        if declared is None:
            signature[name] = "constexpr"
            constants[(index,)] = shipped.constants.get(name)
        elif isinstance(declared, str):
            signature[name] = plain(declared, (index,))
        else:
            signature[name] = tuple(plain(d, (index, i)) for i, d in enumerate(declared))
    return triton.compiler.ASTSource(
        fn=shipped.kernel, signature=signature, constexprs=constants, attrs=attributes
    )


def _assemble(ptx: str) -> dict[str, int]:
    """ptxas -v of the target that the PTX names."""
    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert target, "PTX names no target"
    blackwell = int(re.sub(r"\D", "", target[1])) >= 100
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [tools / ("ptxas-blackwell" if blackwell else "ptxas"), "-v", source]
        command += [f"--gpu-name={target[1]}", "-o", Path(folder) / "kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {
        "registers": re.search(r"Used (\d+) registers", report),
        "stores": re.search(r"(\d+) bytes spill stores", report),
        "loads": re.search(r"(\d+) bytes spill loads", report),
    }
    assert all(found.values()), report
    numbers = {name: int(match[1]) for name, match in found.items() if match}
    return {"registers": numbers["registers"], "spilled": numbers["stores"] + numbers["loads"]}


def compile_for(shipped: Shipped, capability: int) -> dict[str, int]:
    """Registers a thread, bytes spilled, bytes of shared memory, products on tensor cores."""
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    compiled = triton.compiler.compile(
        _source(shipped), target=target, options=dict(shipped.launch)
    )
    ptx = compiled.asm["ptx"]
    products = len(TENSOR_CORES.findall(ptx))
    return {**_assemble(ptx), "shared": compiled.metadata.shared, "tensor_cores": products}


def shipped_of(stem: str) -> tuple[Shipped, ...]:
    kernels: tuple[Shipped, ...] = import_module(f"tests.ops.aot_{stem}").SHIPPED
    return kernels


def _compiled(place: tuple[int, int]) -> dict[str, int]:
    """One kernel of the stem on the command line, by its place, for one capability."""
    index, capability = place
    return compile_for(shipped_of(sys.argv[1])[index], capability)


def main() -> None:
    kernels = shipped_of(sys.argv[1])
    places = [(i, capability) for i, one in enumerate(kernels) for capability in one.targets]
    # forked: a kernel is not a thing that can be sent
    with get_context("fork").Pool(os.cpu_count()) as pool:
        found = pool.map(_compiled, places, chunksize=1)
    names = [f"{kernels[index].name}-sm{capability}" for index, capability in places]
    print(json.dumps(dict(zip(names, found, strict=True))))


if __name__ == "__main__":
    main()
