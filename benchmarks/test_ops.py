"""`pytest benchmarks`: every case of the catalog that is not tiny, by the automatic backend."""

import pytest
import torch

from deepfusion_kernels.bench.runner import forward_backward
from deepfusion_kernels.cases import Case
from deepfusion_kernels.catalog import CATALOG

SHAPES = [
    pytest.param(op.stem, case, id=f"{case.door}-{case.name}")
    for op in CATALOG.values()
    for case in op.cases
    if not case.quick
]


@pytest.mark.parametrize("stem, case", SHAPES)
def test_forward_backward(
    benchmark: pytest.FixtureRequest,
    stem: str,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    call = forward_backward(CATALOG[stem].doors[case.door], case.make(device, dtype, 0))

    def once() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.pedantic(once, rounds=5, warmup_rounds=1)
