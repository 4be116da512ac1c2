"""What topk_logprobs asks of a backend, and its chunks of rows.

logprob_k = (s_k - max s) / tau - ln sum_v e^((s_v - max s) / tau)      s = rows, or rows W^T + bias
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# float32 logits that exist at a time, where hidden states are projected
CHUNK_BYTES = 64 << 20
# numbers of a head that are widened at a time: 16 MiB
PIECE = 1 << 22
Select = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]


class Teacher(NamedTuple):
    """Rows [T, V] of logits, or [T, D] of hidden states beside a head [V, D]."""

    rows: Tensor
    weight: Tensor | None
    bias: Tensor | None
    k: int
    temperature: float
    chunk_bytes: int

    @property
    def wide(self) -> torch.dtype:
        """The dtype of log-probabilities."""
        return torch.float64 if self.rows.dtype == torch.float64 else torch.float32

    @property
    def columns(self) -> int:
        """V."""
        return self.rows.shape[1] if self.weight is None else self.weight.shape[0]


def by_chunks(teacher: Teacher, select: Select) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [T, k], select(logits, k, temperature) applied chunk by chunk."""
    T = teacher.rows.shape[0]
    ids = teacher.rows.new_empty((T, teacher.k), dtype=torch.int64)
    logprobs = teacher.rows.new_empty((T, teacher.k), dtype=teacher.wide)
    for block, logits in _chunks(teacher):
        ids[block], logprobs[block] = select(logits, teacher.k, teacher.temperature)
    return ids, logprobs


def _chunks(teacher: Teacher) -> Iterator[tuple[slice, Tensor]]:
    T = teacher.rows.shape[0]
    rows = max(1, teacher.chunk_bytes // (teacher.columns * teacher.wide.itemsize))
    memory = None
    if teacher.weight is not None:
        memory = teacher.rows.new_empty((min(rows, T), teacher.columns), dtype=teacher.wide)
    for begin in range(0, T, rows):
        block = slice(begin, min(begin + rows, T))
        if memory is None:
            yield block, teacher.rows[block]
        else:
            yield block, _project(teacher, block, memory[: block.stop - begin])


def _project(teacher: Teacher, block: slice, out_TV: Tensor) -> Tensor:
    """Logits of a chunk in the wide dtype, the head widened in pieces."""
    hidden, weight = teacher.rows[block], teacher.weight
    assert weight is not None, "only hidden states are projected"
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out_TV)
    else:
        hidden, step = hidden.to(teacher.wide), max(1, PIECE // weight.shape[1])
        for begin in range(0, weight.shape[0], step):
            piece = slice(begin, begin + step)
            torch.mm(hidden, weight[piece].T.to(teacher.wide), out=out_TV[:, piece])
    return out_TV if teacher.bias is None else out_TV.add_(teacher.bias)
