"""Writes csrc as plain C++ in which every CUDA kernel runs on the host: translate.py CSRC OUT.

kernel<<<grid, block, bytes, stream>>>(...)   a call of cuda_on_host::Launch
__shared__ T name[n];                         static memory that is NaN when a block begins
extern __shared__ T name[];                   the launch's own, in its bytes
torch::stable::accelerator::DeviceGuard       nothing: there is no device to choose
deepfusion_native, for the device CUDA        the namespace deepfusion_on_host, for CPU tensors
"""

import re
import sys
from pathlib import Path

KERNEL = r"(\w+(?:\s*<[^<>;]*(?:<[^<>;]*>[^<>;]*)*>)?)"
LAUNCH = re.compile(KERNEL + r"\s*<<<([^;]*?)>>>\(")
DYNAMIC = re.compile(r"extern __shared__ __align__\(\d+\) unsigned char (\w+)\[\];")
SHARED = re.compile(r"__shared__ ([^;]*);")
ALIGNMENT = re.compile(r"(alignas\(\w+\) |)(.*)", re.DOTALL)
NAME = re.compile(r"(\w+)(?:\[[^\]]*\])*$")


def declare(match: re.Match[str]) -> str:
    """`__shared__ T a[2], b;` as static memory, poisoned once a block."""
    name = NAME.search(match[1])
    assert name, match[0]
    assert "," not in match[1].split("(")[0], f"one declaration a variable: {match[0]}"
    seen = f"static uint64_t {name[1]}_seen = 0;"
    poison = f"::cuda_on_host::poison(&{name[1]}, sizeof({name[1]}), {name[1]}_seen);"
    alignment, declared = ALIGNMENT.match(match[1]).groups()
    return f"{alignment}static {declared}; {seen} {poison}"


def translate(source: str) -> str:
    source = LAUNCH.sub(r"::cuda_on_host::Launch(\1, \2)(", source)
    source = DYNAMIC.sub(r"unsigned char* \1 = ::cuda_on_host::dynamic_shared();", source)
    source = SHARED.sub(declare, source)
    source = source.replace("torch::stable::accelerator::DeviceGuard", "::cuda_on_host::NoDevice")
    source = source.replace("__CUDACC__", "DF_CUDA_ON_HOST")
    source = source.replace("IMPL(deepfusion_native, CUDA,", "IMPL(deepfusion_on_host, CPU,")
    return source.replace("LIBRARY(deepfusion_native,", "LIBRARY(deepfusion_on_host,")


def main() -> None:
    csrc, out = map(Path, sys.argv[1:])
    wanted = [path for path in csrc.rglob("*") if path.suffix in (".h", ".cuh", ".cu")]
    for path in [*wanted, csrc / "library.cpp"]:
        relative = path.relative_to(csrc)
        if relative.parts[0] == "tests":
            continue
        target = (out / relative).with_suffix(".cpp" if path.suffix == ".cu" else path.suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = translate(path.read_text())
        # what has not changed keeps its date, and is not compiled again
        if not target.exists() or target.read_text() != text:
            target.write_text(text)


if __name__ == "__main__":
    main()
