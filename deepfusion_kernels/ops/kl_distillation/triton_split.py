"""Few rows on many multiprocessors: several programs a row, then one that merges their sums.

partial (rows, segments) -> 8 sums each; merge (rows): segments in ascending order, so that the bits
repeat; jsd once more for KL(q | m) and KL(p | m), which need the merged normalisers.
"""

from __future__ import annotations

from ..._triton import tl, triton
from ..shared.kl_math import LOG2E, log_sum, merge_kl
from .triton_rows import jsd_sums, one_sweep_kl, row_loss, row_ptr, store_statistics, sweep


@triton.jit
def _kl_partial_kernel(
    student, teacher, keep_ptr, partial_ptr, columns, span, scalars, DIVERGENCE: tl.constexpr,
    OWN_SUM: tl.constexpr, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Sums over `span` columns of a row; columns = (V_s, V shared)."""
    t = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    if keep_ptr is not None:  # noqa: SIM102
        if tl.load(keep_ptr + t) == 0:
            return
    teacher_ptr = None
    if teacher is not None:
        teacher_ptr = row_ptr(teacher, t)
    begin = segment * span
    state, m_1, l_1 = sweep(
        row_ptr(student, t), teacher_ptr, begin, begin + span, columns, scalars, DIVERGENCE,
        OWN_SUM, CAPPED, BLOCK_V,
    )  # fmt: skip
    m_s, l_s, m_t, l_t, weighted, infinite = state
    at = partial_ptr + (t * tl.num_programs(1) + segment) * 8
    store_statistics(at, m_s, l_s, m_t, l_t, weighted, infinite, m_1, l_1)


@triton.jit
def _kl_merge_kernel(
    student, labels_ptr, keep_ptr, partial_ptr, loss_ptr, stats_ptr, V_s, segments, scalars,
    WITH_KD: tl.constexpr, DIVERGENCE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Statistics of a row, and its loss where that needs no second sweep."""
    t = tl.program_id(0).to(tl.int64)
    at = stats_ptr + t * 8
    if keep_ptr is not None:  # noqa: SIM102
        if tl.load(keep_ptr + t) == 0:
            tl.store(loss_ptr + t, 0.0)
            tl.store(at + tl.arange(0, 8), tl.zeros([8], tl.float32))
            return
    state = (-1e30, 0.0, -1e30, 0.0, 0.0, 0.0)
    m_1, l_1 = -1e30, 0.0
    for segment in range(segments):
        part = partial_ptr + (t * segments + segment) * 8
        other = (
            tl.load(part), tl.load(part + 1), tl.load(part + 2), tl.load(part + 3),
            tl.load(part + 4), tl.load(part + 5),
        )  # fmt: skip
        state = merge_kl(state, other, scalars[1], DIVERGENCE)
        n = tl.maximum(m_1, tl.load(part + 6))
        l_1 = l_1 * tl.exp2((m_1 - n) * LOG2E)
        l_1 += tl.load(part + 7) * tl.exp2((tl.load(part + 6) - n) * LOG2E)
        m_1 = n
    m_s, l_s, m_t, l_t, _, _ = state
    ln_l_s = log_sum(m_s, l_s)
    ln_l_t = log_sum(m_t, l_t)
    ln_l_1 = log_sum(m_1, l_1)
    k = 0.0
    if WITH_KD:
        k = one_sweep_kl(state, ln_l_s, ln_l_t, DIVERGENCE)
    label = 0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + t)
    loss = row_loss(k, k, row_ptr(student, t), label, V_s, m_1, ln_l_1, scalars, WITH_KD,
                    labels_ptr is not None, DIVERGENCE, CAPPED)  # fmt: skip
    tl.store(loss_ptr + t, loss)
    store_statistics(at, m_s, ln_l_s, m_t, ln_l_t, k, k, m_1, ln_l_1)


@triton.jit
def _jsd_partial_kernel(
    student, teacher, keep_ptr, partial_ptr, stats_ptr, V, span, scalars, CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """KL(q | m) and KL(p | m) over `span` columns of a row."""
    t = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    if keep_ptr is not None:  # noqa: SIM102
        if tl.load(keep_ptr + t) == 0:
            return
    at = stats_ptr + t * 8
    statistics = (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3))
    begin = segment * span
    k_s, k_t = jsd_sums(
        row_ptr(student, t), row_ptr(teacher, t), begin, tl.minimum(begin + span, V), statistics,
        scalars, CAPPED, BLOCK_V,
    )  # fmt: skip
    part = partial_ptr + (t * tl.num_programs(1) + segment) * 8
    tl.store(part, k_s)
    tl.store(part + 1, k_t)


@triton.jit
def _jsd_merge_kernel(keep_ptr, partial_ptr, loss_ptr, stats_ptr, segments, scalars):
    """Adds jsd to the loss of a row."""
    t = tl.program_id(0).to(tl.int64)
    if keep_ptr is not None:  # noqa: SIM102
        if tl.load(keep_ptr + t) == 0:
            return
    beta, kd_scale = scalars[0], scalars[2]
    k_s, k_t = 0.0, 0.0
    for segment in range(segments):
        part = partial_ptr + (t * segments + segment) * 8
        k_s += tl.load(part)
        k_t += tl.load(part + 1)
    tl.store(stats_ptr + t * 8 + 4, k_s)
    tl.store(stats_ptr + t * 8 + 5, k_t)
    loss = tl.load(loss_ptr + t)
    tl.store(loss_ptr + t, loss + kd_scale * (beta * k_t + (1.0 - beta) * k_s))
