"""The k largest logits of each row by the library, their log-probabilities around one Triton sweep.

Rows stay in their dtype: no float32 copy of them exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._triton import tl, triton
from ..shared.kl_math import LOG2E, add_exp_sum, load_clean, log_sum
from ..shared.kl_options import MISSING

BLOCK_V = 4096
LAUNCH = {"num_warps": 8, "maxnreg": 128}


@triton.jit
def _log_sum_kernel(
    logits_ptr, stride_t, max_ptr, log_sum_ptr, V, inv_tau, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Maximum m and ln sum e^((s - m) / tau) of each row."""
    t = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + t * stride_t
    m, l = -1e30, 0.0
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        m, l = add_exp_sum(m, l, load_clean(row_ptr, v, v < V), inv_tau * LOG2E)
    tl.store(max_ptr + t, m)
    tl.store(log_sum_ptr + t, log_sum(m, l))


def select(logits_TV: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [T, k] of the largest logits of each row, largest first."""
    T, V = logits_TV.shape
    values_TK, ids_TK = logits_TV.topk(k)
    max_T1, ln_l_T1 = (logits_TV.new_empty((T, 1), dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(logits_TV):
        _log_sum_kernel[(T,)](
            logits_TV, logits_TV.stride(0), max_T1, ln_l_T1, V, 1 / temperature,
            BLOCK_V=int(min(BLOCK_V, max(16, triton.next_power_of_2(V)))), **LAUNCH,
        )  # fmt: skip
    values_TK = values_TK.float()
    logprobs_TK = (values_TK - max_T1) / temperature - ln_l_T1
    is_missing = (values_TK <= MISSING) & (ln_l_T1 == ln_l_T1)
    return ids_TK, torch.where(is_missing, -torch.inf, logprobs_TK)
