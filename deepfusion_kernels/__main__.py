"""`python -m deepfusion_kernels`: what was built; for every op, who serves it here and why."""

from __future__ import annotations

import platform

import torch

from . import __version__, _native, backends
from ._triton import HAS_TRITON, INTERPRETED, triton
from .catalog import CATALOG, Op


def build_lines() -> list[str]:
    """What is installed and what the native library holds."""
    if HAS_TRITON:
        kind = ", interpreted" if INTERPRETED else ""
        triton_line = f"triton      {triton.__version__}{kind}"
    else:
        triton_line = "triton      not installed: pip install 'deepfusion-moe[triton]'"
    lines = [
        f"deepfusion_kernels {__version__}",
        f"python      {platform.python_version()}",
        f"torch       {torch.__version__}",
        triton_line,
    ]
    if not _native.BUILD:
        return [*lines, "native      not built: no C++ compiler was found at installation"]
    build = _native.BUILD
    here, archs = build["cpu_level_here"], build["cuda_archs"] or "not built: no nvcc was found"
    lines += [
        f"native cpu  {build['cpu_levels']} (here: {here}), g++ {build['compiler']}",
        f"native cuda {archs}",
    ]
    return lines


def op_lines(op: Op, device: torch.device) -> list[str]:
    """The backends of one op for float32 tensors on a device."""
    tensor = torch.empty(1, device=device)
    taken = backends.choose(None, tensor, op.impls)
    lines = [f"{op.stem} ({', '.join(op.doors)})"]
    for name in op.impls:
        reason = backends.explain(tensor, op.impls).get(name) or backends.declines(
            name, tensor, op.impls
        )
        mark = "taken" if name == taken else f"declines: {reason}" if reason else "on request"
        lines.append(f"  {name:10} {mark}")
    return lines


def main() -> None:
    """Print the build and, for each device kind present, the table of backends."""
    print("\n".join(build_lines()))
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for kind in kinds:
        name = f" ({torch.cuda.get_device_name()})" if kind == "cuda" else ""
        print(f"\nfor {kind} tensors{name}")
        for op in CATALOG.values():
            print("\n".join(op_lines(op, torch.device(kind))))


if __name__ == "__main__":
    main()
