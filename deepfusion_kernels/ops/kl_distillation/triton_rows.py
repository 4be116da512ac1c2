"""Triton kernels of kl_distillation: one program a row, in blocks of columns.

Few rows are split among several programs each: triton_split.py.

With a soft cap b every logit is b tanh(s / b) as soon as it is loaded, and its gradient passes
through 1 - tanh(s / b)^2 before it is stored. Missing logits stay missing.
"""

from __future__ import annotations

from ..._triton import tl, triton
from ..shared.kl_math import (
    LOG2E,
    MISSING,
    add_exp_sum,
    add_kl,
    expm1_nonpositive,
    finish_kl,
    jsd_point,
    load_clean,
    log_prob,
    log_sum,
    slopes,
)


@triton.jit
def _soft_capped(x, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        e = expm1_nonpositive(-2.0 * tl.abs(x / softcap))
        share = e / (2.0 + e)
        x = tl.where(x <= MISSING, x, tl.where(x < 0.0, softcap * share, -softcap * share))
    return x


@triton.jit
def _through_cap(gradient, x, softcap, CAPPED: tl.constexpr):
    """The gradient of raw logits from that of the capped x."""
    if CAPPED:
        share = x / softcap
        gradient = tl.where(x <= MISSING, 0.0, gradient * (1.0 - share * share))
    return gradient


@triton.jit
def load(row_ptr, v, v_ok, softcap, CAPPED: tl.constexpr):
    return _soft_capped(load_clean(row_ptr, v, v_ok), softcap, CAPPED)


@triton.jit
def row_ptr(logits, t):
    """Start of row t of [A, B, V], given as (pointer, B, stride_a, stride_b)."""
    ptr, B, stride_a, stride_b = logits
    return ptr + (t // B) * stride_a + (t % B) * stride_b


@triton.jit
def jsd_sums(
    student_ptr, teacher_ptr, begin, end, statistics, scalars, CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """KL(q | m) and KL(p | m) over [begin, end): a second sweep, with the final statistics."""
    m_s, ln_l_s, m_t, ln_l_t = statistics
    beta, inv_tau, softcap = scalars[0], scalars[1], scalars[4]
    k_s = 0.0
    k_t = 0.0
    for start in range(begin, end, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        ln_q = log_prob(load(student_ptr, v, v < end, softcap, CAPPED), m_s, ln_l_s, inv_tau)
        ln_p = log_prob(load(teacher_ptr, v, v < end, softcap, CAPPED), m_t, ln_l_t, inv_tau)
        to_p, to_q = jsd_point(ln_q, ln_p, beta)
        k_s += tl.sum(tl.exp2(ln_q * LOG2E) * to_q, 0)
        k_t -= tl.sum(tl.exp2(ln_p * LOG2E) * to_p, 0)
    return k_s, k_t


@triton.jit
def cross_entropy(student_ptr, label, V_s, m_1, ln_l_1, softcap, CAPPED: tl.constexpr):
    """+inf where the label's own logit is missing, NaN where there is no such column."""
    inside = (label >= 0) & (label < V_s)
    at_label = tl.load(student_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
    at_label = _soft_capped(at_label, softcap, CAPPED)
    missing = at_label <= MISSING
    return m_1 + ln_l_1 - tl.where(missing, -float("inf"), at_label)


@triton.jit
def sweep(
    student_ptr, teacher_ptr, begin, end, columns, scalars, DIVERGENCE: tl.constexpr,
    OWN_SUM: tl.constexpr, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Sums over the columns [begin, end): (m_s, l_s, m_t, l_t, weighted, infinite), m_1, l_1."""
    V_s, V_kd = columns
    inv_tau, softcap = scalars[1], scalars[4]
    lanes = tl.arange(0, BLOCK_V)
    m_s, l_s, m_t, l_t, weighted, infinite = -1e30, 0.0, -1e30, 0.0, 0.0, 0
    m_1, l_1 = -1e30, 0.0
    if teacher_ptr is not None:
        for start in range(begin, tl.minimum(end, V_kd), BLOCK_V):
            v = start + lanes
            v_ok = v < tl.minimum(end, V_kd)
            s = load(student_ptr, v, v_ok, softcap, CAPPED)
            y = load(teacher_ptr, v, v_ok, softcap, CAPPED)
            state = (m_s, l_s, m_t, l_t, weighted, infinite)
            m_s, l_s, m_t, l_t, weighted, infinite = add_kl(state, s, y, inv_tau, DIVERGENCE)
            if OWN_SUM:
                m_1, l_1 = add_exp_sum(m_1, l_1, s, LOG2E)
    if OWN_SUM:
        for start in range(tl.maximum(begin, V_kd), tl.minimum(end, V_s), BLOCK_V):
            v = start + lanes
            s = load(student_ptr, v, v < tl.minimum(end, V_s), softcap, CAPPED)
            m_1, l_1 = add_exp_sum(m_1, l_1, s, LOG2E)
    else:
        m_1, l_1 = m_s, l_s
    return (m_s, l_s, m_t, l_t, weighted, infinite), m_1, l_1


@triton.jit
def row_loss(k_s, k_t, student_ptr, label, V_s, m_1, ln_l_1, scalars, WITH_KD: tl.constexpr,
             WITH_CE: tl.constexpr, DIVERGENCE: tl.constexpr, CAPPED: tl.constexpr):  # fmt: skip
    """kd_scale KD + ce_weight CE of a row."""
    beta, _, kd_scale, ce_weight, softcap = scalars
    loss = 0.0
    if WITH_KD:
        loss += kd_scale * (k_s if DIVERGENCE < 2 else beta * k_t + (1.0 - beta) * k_s)
    if WITH_CE:
        loss += ce_weight * cross_entropy(student_ptr, label, V_s, m_1, ln_l_1, softcap, CAPPED)
    return loss


@triton.jit
def store_statistics(at, m_s, ln_l_s, m_t, ln_l_t, k_s, k_t, m_1, ln_l_1):
    tl.store(at, m_s)
    tl.store(at + 1, ln_l_s)
    tl.store(at + 2, m_t)
    tl.store(at + 3, ln_l_t)
    tl.store(at + 4, k_s)
    tl.store(at + 5, k_t)
    tl.store(at + 6, m_1)
    tl.store(at + 7, ln_l_1)


@triton.jit
def one_sweep_kl(state, ln_l_s, ln_l_t, DIVERGENCE: tl.constexpr):
    """KD of merged sums; 0 for jsd, which needs a second sweep."""
    _, l_s, _, l_t, weighted, infinite = state
    k_s = 0.0
    if DIVERGENCE == 0:
        k_s = finish_kl(weighted, l_t, ln_l_t, ln_l_s, infinite)
    if DIVERGENCE == 1:
        k_s = finish_kl(weighted, l_s, ln_l_s, ln_l_t, infinite)
    return k_s


@triton.jit
def _kl_forward_kernel(
    student, teacher, labels_ptr, keep_ptr, loss_ptr, stats_ptr, columns, scalars,
    DIVERGENCE: tl.constexpr, OWN_SUM: tl.constexpr, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """columns = (V_s, V shared), scalars = (beta, 1 / tau, kd_scale, ce_weight, b)."""
    t = tl.program_id(0).to(tl.int64)
    at = stats_ptr + t * 8
    # a masked row is never read; two conditions, since None is known when compiling
    if keep_ptr is not None:  # noqa: SIM102
        if tl.load(keep_ptr + t) == 0:
            tl.store(loss_ptr + t, 0.0)
            tl.store(at + tl.arange(0, 8), tl.zeros([8], tl.float32))
            return
    student_ptr = row_ptr(student, t)
    teacher_ptr = None
    if teacher is not None:
        teacher_ptr = row_ptr(teacher, t)
    state, m_1, l_1 = sweep(
        student_ptr, teacher_ptr, 0, columns[0], columns, scalars, DIVERGENCE, OWN_SUM, CAPPED,
        BLOCK_V,
    )  # fmt: skip
    m_s, l_s, m_t, l_t, _, _ = state
    ln_l_s = log_sum(m_s, l_s)
    ln_l_t = log_sum(m_t, l_t)
    ln_l_1 = log_sum(m_1, l_1)
    k_s, k_t = 0.0, 0.0
    if teacher is not None:
        if DIVERGENCE == 2:
            k_s, k_t = jsd_sums(
                student_ptr, teacher_ptr, 0, columns[1], (m_s, ln_l_s, m_t, ln_l_t), scalars,
                CAPPED, BLOCK_V,
            )  # fmt: skip
        else:
            k_s = one_sweep_kl(state, ln_l_s, ln_l_t, DIVERGENCE)
            k_t = k_s
    label = 0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + t)
    loss = row_loss(k_s, k_t, student_ptr, label, columns[0], m_1, ln_l_1, scalars,
                    teacher is not None, labels_ptr is not None, DIVERGENCE, CAPPED)  # fmt: skip
    tl.store(loss_ptr + t, loss)
    store_statistics(at, m_s, ln_l_s, m_t, ln_l_t, k_s, k_t, m_1, ln_l_1)


@triton.jit
def _kl_backward_kernel(
    dloss_ptr, student, teacher, labels_ptr, keep_ptr, stats_ptr, dstudent_ptr, dteacher_ptr,
    columns, scalars, DIVERGENCE: tl.constexpr, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """columns = (V_s, V_t, V shared, columns of a program).

    scalars = (beta, 1 / tau, kd_scale / tau, ce_weight, b).
    """
    t = tl.program_id(0).to(tl.int64)
    V_s, V_t, V_kd, span = columns
    begin = tl.program_id(1) * span
    beta, inv_tau, kd_scale, ce_weight, softcap = scalars
    kept = True
    if keep_ptr is not None:
        kept = tl.load(keep_ptr + t) != 0
    G = tl.load(dloss_ptr + t)
    at = stats_ptr + t * 8
    m_1 = tl.load(at + 6)
    ln_l_1 = tl.load(at + 7)
    student_ptr = row_ptr(student, t)
    for start in range(begin, tl.minimum(begin + span, tl.maximum(V_s, V_t)), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        s = load(student_ptr, v, (v < V_s) & kept, softcap, CAPPED)
        dx = tl.zeros([BLOCK_V], tl.float32)
        dy = tl.zeros([BLOCK_V], tl.float32)
        if teacher is not None:
            y = load(row_ptr(teacher, t), v, (v < V_kd) & kept, softcap, CAPPED)
            ln_q = log_prob(s, tl.load(at), tl.load(at + 1), inv_tau)
            ln_p = log_prob(y, tl.load(at + 2), tl.load(at + 3), inv_tau)
            k_s = tl.load(at + 4)
            k_t = tl.load(at + 5)
            slope_x, slope_y = slopes(ln_q, ln_p, beta, k_s, k_t, DIVERGENCE)
            dx = tl.where(v < V_kd, G * kd_scale * slope_x, 0.0)
            dy = tl.where(v < V_kd, G * kd_scale * slope_y, 0.0)
            dy = _through_cap(dy, y, softcap, CAPPED)
        if labels_ptr is not None:
            label = tl.load(labels_ptr + t)
            # a label outside the row: NaN, as its loss
            hit = tl.where((label >= 0) & (label < V_s), 1.0, float("nan"))
            q_1 = tl.exp2(log_prob(s, m_1, ln_l_1, 1.0) * LOG2E)
            dx += G * ce_weight * (q_1 * hit - tl.where(v == label, 1.0, 0.0))
        if dstudent_ptr is not None:
            dx = _through_cap(dx, s, softcap, CAPPED)
            dx = tl.where(kept, dx, 0.0).to(dstudent_ptr.dtype.element_ty)
            tl.store(dstudent_ptr + t * V_s + v, dx, mask=v < V_s)
        if dteacher_ptr is not None:
            dy = tl.where(kept, dy, 0.0).to(dteacher_ptr.dtype.element_ty)
            tl.store(dteacher_ptr + t * V_t + v, dy, mask=v < V_t)
