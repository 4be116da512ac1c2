"""Triton device functions of one row with K kept entries, shared by both directions.

Everything that concerns the entries alone is a vector of BLOCK_K lanes; the mass outside the kept
tokens is 1 - sum p in float64, since it cancels where the teacher is sure.
"""

from __future__ import annotations

from ..._triton import tl, triton
from ..shared.kl_math import LOG2E, MISSING, jsd_point, load_clean, log_prob
from .problem import FLOOR

SMALLEST = tl.constexpr(FLOOR)


@triton.jit
def row_ptr(logits, t):
    """Start of row t of [A, B, V], given as (pointer, B, stride_a, stride_b)."""
    ptr, B, stride_a, stride_b = logits
    return ptr + (t // B) * stride_a + (t % B) * stride_b


@triton.jit
def kept_entries(student_ptr, teacher, t, V, BLOCK_K: tl.constexpr):
    """Entries of row t that count: ids, whether they do, the student's logits, ln p or -inf.

    Of equal ids the first counts, ids outside the row are padding.
    """
    ids_ptr, logprobs_ptr, K = teacher
    lanes = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + t * K + lanes, mask=lanes < K, other=-1).to(tl.int64)
    repeats = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, K, 16):
        others = start + tl.arange(0, 16)
        other = tl.load(ids_ptr + t * K + others, mask=others < K, other=-1).to(tl.int64)
        same = (ids[:, None] == other[None, :]) & (others[None, :] < lanes[:, None])
        repeats = tl.maximum(repeats, tl.max(same.to(tl.int32), 1))
    counts = (ids >= 0) & (ids < V) & (repeats == 0)
    ln_p = tl.load(logprobs_ptr + t * K + lanes, mask=counts, other=-float("inf"))
    return ids, counts, load_clean(student_ptr, ids, counts), ln_p.to(tl.float64)


@triton.jit
def teacher_rest(logprobs, TAIL: tl.constexpr):
    """ln p over its normaliser, the mass kept, ln of the mass outside; sums in float64."""
    mass = tl.sum(tl.exp(logprobs), 0)
    rest = 1.0 - mass
    ln_rest = tl.log(tl.where(rest < SMALLEST, SMALLEST, rest)).to(tl.float32)
    if TAIL == 2:
        logprobs = tl.where(mass > 0.0, logprobs - tl.log(mass), -float("inf"))
    return logprobs.to(tl.float32), mass.to(tl.float32), ln_rest


@triton.jit
def terms(ln_q, ln_p, beta, DIVERGENCE: tl.constexpr):
    """What outcomes add to KD's two halves; one of probability zero adds nothing."""
    no_q = ln_q == -float("inf")
    no_p = ln_p == -float("inf")
    q = tl.exp2(ln_q * LOG2E)
    p = tl.exp2(ln_p * LOG2E)
    infinite = float("inf")
    if DIVERGENCE == 0:
        to_q = tl.where(no_p, 0.0, tl.where(no_q, infinite, p * (ln_p - ln_q)))
        to_p = 0.0 * q
    elif DIVERGENCE == 1:
        to_q = tl.where(no_q, 0.0, tl.where(no_p, infinite, q * (ln_q - ln_p)))
        to_p = 0.0 * q
    else:
        w, v = jsd_point(ln_q, ln_p, beta)
        to_q = tl.where(no_q, 0.0, q * v)
        to_p = tl.where(no_p, 0.0, -p * w)
    return to_q, to_p


@triton.jit
def slope(ln_q, ln_p, beta, k_s, DIVERGENCE: tl.constexpr):
    """H_k of docs/ops/topk_kl.md; 0 where the student has no such outcome."""
    q = tl.exp2(ln_q * LOG2E)
    if DIVERGENCE == 0:
        return -tl.exp2(ln_p * LOG2E) + 0.0 * q
    elif DIVERGENCE == 1:
        return tl.where(ln_q == -float("inf"), 0.0, q * (ln_q - ln_p - k_s))
    else:
        _, v = jsd_point(ln_q, ln_p, beta)
        return tl.where(ln_q == -float("inf"), 0.0, (1.0 - beta) * q * (v - k_s))


@triton.jit
def log_student(s_k, counts, m, ln_l, inv_tau):
    return tl.where(counts & (s_k > MISSING), log_prob(s_k, m, ln_l, inv_tau), -float("inf"))
