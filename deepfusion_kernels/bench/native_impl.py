"""What our kernels hold beside torch's allocator: kept blocks in use, and scratch."""

from __future__ import annotations

import torch

from .. import _native


def held_bytes(restart: bool = False) -> tuple[int, int]:
    """Bytes held now, and the most since the count was last restarted; 0 without the library."""
    if not _native.HAS_CPU:
        return 0, 0
    counts = torch.zeros(2, dtype=torch.int64)
    torch.ops.deepfusion_native.held_bytes(counts, restart)
    now, most = counts.tolist()
    return now, most
