"""Triton device functions of the distillation ops: one row, one block of columns at a time.

    e^((v - m) / tau) = 2^((v - m) k)    k = log2(e) / tau
    ln q = (s - m_s) / tau - ln l_s      raw logits at or below -1e30 count as -inf

m and ln l stay apart: their sum would round at the size of the logits. docs/ops/kl_distillation.md
"""

from __future__ import annotations

from ..._triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MISSING = tl.constexpr(-1e30)
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)


@triton.jit
def load_clean(row_ptr, v, v_ok):
    """Columns in float32; missing ones, and those outside the row, become -1e30."""
    x = tl.load(row_ptr + v, mask=v_ok, other=-float("inf")).to(tl.float32)
    # not maximum(x, MISSING), which would swallow NaN
    return tl.where(x < MISSING, MISSING, x)


@triton.jit
def rescaled(total, factor):
    """A factor of 0 erases weighted sums over columns that were all missing: they may be infinite.

    Plain sums of exponentials never are, and a NaN among them must survive: they are multiplied.
    """
    return tl.where(factor == 0.0, 0.0, total * factor)


@triton.jit
def add_exp_sum(m, l, x, k):
    """Running maximum and sum of 2^((x - m) k) over one more block."""
    n = tl.maximum(m, tl.max(x, 0))
    return n, l * tl.exp2((m - n) * k) + tl.sum(tl.exp2((x - n) * k), 0)


@triton.jit
def add_kl(state, s, t, inv_tau, DIVERGENCE: tl.constexpr):
    """One more block into (m_s, l_s, m_t, l_t, weighted gap, columns that make it infinite).

    forward_kl weighs gap = (t - m_t) / tau - (s - m_s) / tau by the teacher and minds columns
    missing in the student alone; reverse_kl the other way round. jsd needs the sums only.
    """
    m_s, l_s, m_t, l_t, weighted, infinite = state
    k = inv_tau * LOG2E
    n_s = tl.maximum(m_s, tl.max(s, 0))
    n_t = tl.maximum(m_t, tl.max(t, 0))
    u_s = (m_s - n_s) * inv_tau
    u_t = (m_t - n_t) * inv_tau
    f_s = tl.exp2((m_s - n_s) * k)
    f_t = tl.exp2((m_t - n_t) * k)
    e_s = tl.exp2((s - n_s) * k)
    e_t = tl.exp2((t - n_t) * k)
    gap = (t - n_t) * inv_tau - (s - n_s) * inv_tau
    if DIVERGENCE == 0:
        weighted = rescaled(weighted + l_t * (u_t - u_s), f_t) + tl.sum(e_t * gap, 0)
        infinite += tl.sum(((s <= MISSING) & (t > MISSING)).to(tl.int32), 0)
    if DIVERGENCE == 1:
        weighted = rescaled(weighted + l_s * (u_s - u_t), f_s) - tl.sum(e_s * gap, 0)
        infinite += tl.sum(((t <= MISSING) & (s > MISSING)).to(tl.int32), 0)
    l_s = l_s * f_s + tl.sum(e_s, 0)
    l_t = l_t * f_t + tl.sum(e_t, 0)
    return n_s, l_s, n_t, l_t, weighted, infinite


@triton.jit
def merge_kl(x, y, inv_tau, DIVERGENCE: tl.constexpr):
    """The sums of two sets of columns, each as add_kl's, as those of their union."""
    x_m_s, x_l_s, x_m_t, x_l_t, x_weighted, x_infinite = x
    y_m_s, y_l_s, y_m_t, y_l_t, y_weighted, y_infinite = y
    n_s = tl.maximum(x_m_s, y_m_s)
    n_t = tl.maximum(x_m_t, y_m_t)
    x_s, x_t = (x_m_s - n_s) * inv_tau, (x_m_t - n_t) * inv_tau
    y_s, y_t = (y_m_s - n_s) * inv_tau, (y_m_t - n_t) * inv_tau
    f_s, f_t = tl.exp2(x_s * LOG2E), tl.exp2(x_t * LOG2E)
    g_s, g_t = tl.exp2(y_s * LOG2E), tl.exp2(y_t * LOG2E)
    weighted = 0.0
    if DIVERGENCE == 0:
        weighted = rescaled(x_weighted + x_l_t * (x_t - x_s), f_t)
        weighted += rescaled(y_weighted + y_l_t * (y_t - y_s), g_t)
    if DIVERGENCE == 1:
        weighted = rescaled(x_weighted + x_l_s * (x_s - x_t), f_s)
        weighted += rescaled(y_weighted + y_l_s * (y_s - y_t), g_s)
    l_s = x_l_s * f_s + y_l_s * g_s
    l_t = x_l_t * f_t + y_l_t * g_t
    return n_s, l_s, n_t, l_t, weighted, x_infinite + y_infinite


@triton.jit
def log_sum(m, l):
    """ln l; NaN where every column was missing, so that no plausible number hides it."""
    return tl.where(m <= MISSING, float("nan"), tl.log(l))


@triton.jit
def finish_kl(weighted, l, ln_l, other_ln_l, infinite):
    """KL from its weighted gaps; l and ln l are those of the side that weighs."""
    kl = weighted / l - ln_l + other_ln_l
    kl = tl.where(kl < 0.0, 0.0, kl)
    # ln l - ln l: 0, or NaN in a row whose NaN must stay one
    return tl.where(infinite > 0, float("inf") + (ln_l + other_ln_l), kl)


@triton.jit
def log_prob(x, m, ln_l, inv_tau):
    """ln q or ln p of one block."""
    return (x - m) * inv_tau - ln_l


@triton.jit
def expm1_nonpositive(x):
    """e^x - 1 for x <= 0: its series where the subtraction would cancel."""
    y = tl.maximum(x, -0.5)
    p = 1.0 + y * (1 / 7) * (1.0 + y * 0.125)
    p = 1.0 + y * 0.5 * (
        1.0 + y * (1 / 3) * (1.0 + y * 0.25 * (1.0 + y * 0.2 * (1.0 + y * (1 / 6) * p)))
    )
    return tl.where(x < -0.5, tl.exp2(x * LOG2E) - 1.0, y * p)


@triton.jit
def log1p_nonpositive(y):
    """ln(1 + y), -1 < y <= 0: near 0 by 2 artanh(y / (2 + y)), as the logarithm errs absolutely."""
    z = y / (2.0 + y)
    w = z * z
    p = 1 / 9 + w * (1 / 11 + w * (1 / 13 + w * (1 / 15)))
    p = 1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * p)))
    return tl.where(y < -0.5, tl.log(1.0 + y), 2.0 * z * p)


@triton.jit
def jsd_point(ln_q, ln_p, beta):
    """ln(m / p) and ln(q / m), stable at any distance: m is never formed in probability space."""
    d = ln_q - ln_p
    e = expm1_nonpositive(-tl.abs(d))
    z = log1p_nonpositive(tl.where(d >= 0.0, beta, 1.0 - beta) * e)
    return tl.where(d >= 0.0, d + z, z), tl.where(d >= 0.0, -z, d - z)


@triton.jit
def slopes(ln_q, ln_p, beta, k_s, k_t, DIVERGENCE: tl.constexpr):
    """d KD / d x and d KD / d y of one block."""
    q = tl.exp2(ln_q * LOG2E)
    p = tl.exp2(ln_p * LOG2E)
    if DIVERGENCE == 0:
        return q - p, p * (ln_p - ln_q - k_t)
    elif DIVERGENCE == 1:
        return q * (ln_q - ln_p - k_s), p - q
    else:
        w, v = jsd_point(ln_q, ln_p, beta)
        return (1.0 - beta) * q * (v - k_s), beta * p * (-w - k_t)
