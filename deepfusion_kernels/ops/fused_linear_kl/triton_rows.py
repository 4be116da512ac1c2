"""Triton kernels on tiles of float32 logits: one program a row, in blocks of columns.

accumulate  one more slice of the vocabulary into the sums of each row
jsd         a second sweep, which needs the finished statistics
finish      sums to statistics and losses
gradient    dS in the memory of the logits: bfloat16 stands in the front half of its float32 row
"""

from __future__ import annotations

from ..._triton import tl, triton
from ..shared.kl_math import (
    LOG2E,
    MISSING,
    add_exp_sum,
    add_kl,
    finish_kl,
    jsd_point,
    log_prob,
    log_sum,
    slopes,
)

# m_s, l_s, m_t, l_t, weighted gap, infinite columns, m_1, l_1, the label's logit, k_s, k_t
SUMS = 11


@triton.jit
def _logits(row_ptr, bias_ptr, v, v_ok):
    """Columns of a tile with their bias, missing ones as -1e30."""
    x = tl.load(row_ptr + v, mask=v_ok, other=-float("inf"))
    if bias_ptr is not None:
        x += tl.load(bias_ptr + v, mask=v_ok, other=0.0).to(tl.float32)
    return tl.where(x < MISSING, MISSING, x)


@triton.jit
def _sum_or(at, first, initial):
    """A row's sum so far; the first slice finds memory that nobody has written."""
    return tl.where(first, initial, tl.load(at))


@triton.jit
def _accumulate_kernel(
    student, student_bias_ptr, teacher, teacher_bias_ptr, labels_ptr, scale_ptr, sums_ptr,
    columns, inv_tau, DIVERGENCE: tl.constexpr, OWN_SUM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """student, teacher = (tile, pitch); columns = (first column, student's here, shared here)."""
    t = tl.program_id(0).to(tl.int64)
    if tl.load(scale_ptr + t) == 0.0:
        return
    begin, V_s, V_kd = columns
    lanes = tl.arange(0, BLOCK_V)
    first = begin == 0
    at = sums_ptr + t * 11
    student_ptr = student[0] + t * student[1]
    m_1 = _sum_or(at + 6, first, -1e30)
    l_1 = _sum_or(at + 7, first, 0.0)
    if teacher is not None:
        teacher_ptr = teacher[0] + t * teacher[1]
        m_s = _sum_or(at, first, -1e30)
        l_s = _sum_or(at + 1, first, 0.0)
        m_t = _sum_or(at + 2, first, -1e30)
        l_t = _sum_or(at + 3, first, 0.0)
        weighted = _sum_or(at + 4, first, 0.0)
        infinite = _sum_or(at + 5, first, 0.0).to(tl.int32)
        for start in range(0, V_kd, BLOCK_V):
            v = start + lanes
            s = _logits(student_ptr, student_bias_ptr, v, v < V_kd)
            y = _logits(teacher_ptr, teacher_bias_ptr, v, v < V_kd)
            state = (m_s, l_s, m_t, l_t, weighted, infinite)
            m_s, l_s, m_t, l_t, weighted, infinite = add_kl(state, s, y, inv_tau, DIVERGENCE)
            if OWN_SUM:
                m_1, l_1 = add_exp_sum(m_1, l_1, s, LOG2E)
        tl.store(at, m_s)
        tl.store(at + 1, l_s)
        tl.store(at + 2, m_t)
        tl.store(at + 3, l_t)
        tl.store(at + 4, weighted)
        tl.store(at + 5, infinite.to(tl.float32))
    if OWN_SUM:
        for start in range(V_kd, V_s, BLOCK_V):
            v = start + lanes
            s = _logits(student_ptr, student_bias_ptr, v, v < V_s)
            m_1, l_1 = add_exp_sum(m_1, l_1, s, LOG2E)
        tl.store(at + 6, m_1)
        tl.store(at + 7, l_1)
    if labels_ptr is not None:
        # stays NaN where no slice has the label's column
        v = tl.load(labels_ptr + t) - begin
        here = (v >= 0) & (v < V_s)
        at_label = tl.load(student_ptr + v, mask=here, other=0.0)
        if student_bias_ptr is not None:
            at_label += tl.load(student_bias_ptr + v, mask=here, other=0.0).to(tl.float32)
        at_label = tl.where(at_label <= MISSING, -float("inf"), at_label)
        tl.store(at + 8, tl.where(here, at_label, _sum_or(at + 8, first, float("nan"))))


@triton.jit
def _jsd_kernel(
    student, student_bias_ptr, teacher, teacher_bias_ptr, scale_ptr, stats_ptr, sums_ptr,
    columns, scalars, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """K_s = KL(q | m) and K_t = KL(p | m) over one more slice; scalars = (beta, 1 / tau)."""
    t = tl.program_id(0).to(tl.int64)
    if tl.load(scale_ptr + t) == 0.0:
        return
    begin, V_kd = columns
    beta, inv_tau = scalars
    at = stats_ptr + t * 8
    m_s = tl.load(at)
    ln_l_s = tl.load(at + 1)
    m_t = tl.load(at + 2)
    ln_l_t = tl.load(at + 3)
    sums = sums_ptr + t * 11
    k_s = _sum_or(sums + 9, begin == 0, 0.0)
    k_t = _sum_or(sums + 10, begin == 0, 0.0)
    student_ptr = student[0] + t * student[1]
    teacher_ptr = teacher[0] + t * teacher[1]
    for start in range(0, V_kd, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        s = _logits(student_ptr, student_bias_ptr, v, v < V_kd)
        y = _logits(teacher_ptr, teacher_bias_ptr, v, v < V_kd)
        ln_q = log_prob(s, m_s, ln_l_s, inv_tau)
        ln_p = log_prob(y, m_t, ln_l_t, inv_tau)
        to_p, to_q = jsd_point(ln_q, ln_p, beta)
        k_s += tl.sum(tl.exp2(ln_q * LOG2E) * to_q, 0)
        k_t -= tl.sum(tl.exp2(ln_p * LOG2E) * to_p, 0)
    tl.store(sums + 9, k_s)
    tl.store(sums + 10, k_t)


@triton.jit
def _finish_kernel(
    scale_ptr, sums_ptr, loss_ptr, stats_ptr, T, scalars, DIVERGENCE: tl.constexpr,
    WITH_KD: tl.constexpr, WITH_CE: tl.constexpr, OWN_SUM: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """scalars = (beta, kd_scale, ce_weight). Masked rows: everything 0."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_ok = t < T
    beta, kd_scale, ce_weight = scalars
    scale = tl.load(scale_ptr + t, mask=t_ok, other=0.0)
    kept = t_ok & (scale != 0.0)
    sums = sums_ptr + t * 11
    loss = tl.zeros([BLOCK_T], tl.float32)
    k_s = tl.zeros([BLOCK_T], tl.float32)
    k_t = tl.zeros([BLOCK_T], tl.float32)
    m_s = tl.load(sums, mask=kept & WITH_KD, other=0.0)
    l_s = tl.load(sums + 1, mask=kept & WITH_KD, other=1.0)
    m_t = tl.load(sums + 2, mask=kept & WITH_KD, other=0.0)
    l_t = tl.load(sums + 3, mask=kept & WITH_KD, other=1.0)
    m_1 = m_s
    l_1 = l_s
    if OWN_SUM:
        m_1 = tl.load(sums + 6, mask=kept, other=0.0)
        l_1 = tl.load(sums + 7, mask=kept, other=1.0)
    ln_l_s = log_sum(m_s, l_s)
    ln_l_t = log_sum(m_t, l_t)
    ln_l_1 = log_sum(m_1, l_1)
    if WITH_KD:
        if DIVERGENCE == 2:
            k_s = tl.load(sums + 9, mask=kept, other=0.0)
            k_t = tl.load(sums + 10, mask=kept, other=0.0)
            loss += kd_scale * (beta * k_t + (1.0 - beta) * k_s)
        else:
            weighted = tl.load(sums + 4, mask=kept, other=0.0)
            infinite = tl.load(sums + 5, mask=kept, other=0.0)
            if DIVERGENCE == 0:
                k_s = finish_kl(weighted, l_t, ln_l_t, ln_l_s, infinite)
            else:
                k_s = finish_kl(weighted, l_s, ln_l_s, ln_l_t, infinite)
            k_t = k_s
            loss += kd_scale * k_s
    if WITH_CE:
        at_label = tl.load(sums + 8, mask=kept, other=0.0)
        loss += ce_weight * (m_1 + ln_l_1 - at_label)
    tl.store(loss_ptr + t, tl.where(kept, scale * loss, 0.0), mask=t_ok)
    at = stats_ptr + t * 8
    tl.store(at, tl.where(kept, m_s, 0.0), mask=t_ok)
    tl.store(at + 1, tl.where(kept, ln_l_s, 0.0), mask=t_ok)
    tl.store(at + 2, tl.where(kept, m_t, 0.0), mask=t_ok)
    tl.store(at + 3, tl.where(kept, ln_l_t, 0.0), mask=t_ok)
    tl.store(at + 4, tl.where(kept, k_s, 0.0), mask=t_ok)
    tl.store(at + 5, tl.where(kept, k_t, 0.0), mask=t_ok)
    tl.store(at + 6, tl.where(kept, m_1, 0.0), mask=t_ok)
    tl.store(at + 7, tl.where(kept, ln_l_1, 0.0), mask=t_ok)


@triton.jit
def _gradient_kernel(
    student, student_bias_ptr, teacher, teacher_bias_ptr, labels_ptr, scale_ptr, stats_ptr,
    gradient, columns, scalars, DIVERGENCE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """gradient = student's memory in dS's dtype; scalars = (beta, 1 / tau, kd / tau, ce)."""
    t = tl.program_id(0).to(tl.int64)
    begin, V_s, V_kd = columns
    beta, inv_tau, kd_scale, ce_weight = scalars
    G = tl.load(scale_ptr + t)
    at = stats_ptr + t * 8
    m_1 = tl.load(at + 6)
    ln_l_1 = tl.load(at + 7)
    student_ptr = student[0] + t * student[1]
    gradient_ptr = gradient[0] + t * gradient[1]
    kept = G != 0.0
    # a masked row is not read
    V_read = tl.where(kept, V_s, 0)
    # NOTE: ascending, since dS of a block lands on logits that earlier blocks have read.
    for start in range(0, V_s, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        s = _logits(student_ptr, student_bias_ptr, v, v < V_read)
        dx = tl.zeros([BLOCK_V], tl.float32)
        if teacher is not None:
            teacher_ptr = teacher[0] + t * teacher[1]
            y = _logits(teacher_ptr, teacher_bias_ptr, v, (v < V_kd) & (v < V_read))
            ln_q = log_prob(s, tl.load(at), tl.load(at + 1), inv_tau)
            ln_p = log_prob(y, tl.load(at + 2), tl.load(at + 3), inv_tau)
            slope, _ = slopes(ln_q, ln_p, beta, tl.load(at + 4), tl.load(at + 5), DIVERGENCE)
            dx = tl.where(v < V_kd, G * kd_scale * slope, 0.0)
        if labels_ptr is not None:
            label = tl.load(labels_ptr + t)
            q_1 = tl.exp2(log_prob(s, m_1, ln_l_1, 1.0) * LOG2E)
            dx += G * ce_weight * (q_1 - tl.where(begin + v == label, 1.0, 0.0))
        dx = tl.where(kept, dx, 0.0).to(gradient[0].dtype.element_ty)
        # NOTE: the first block's dS overwrites logits that other threads may not have read yet.
        tl.debug_barrier()
        tl.store(gradient_ptr + v, dx, mask=v < V_s)
