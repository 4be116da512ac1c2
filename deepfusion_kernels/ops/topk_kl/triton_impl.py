"""topk_kl_distillation in Triton: one program a row, the kept ids beside one sweep of the columns.

l_o = sum_block e - sum_{k in block} e_k,  e = high + low, high a multiple of 2^-11

The kept columns cannot be left out of a sweep cheaply, and subtracting them from the whole would
cancel where the student is sure. Their high parts are summed without rounding, so that only the low
ones, all below 2^-12, can err.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._triton import tl, triton
from ..shared.kl_math import LOG2E, MISSING, add_exp_sum, load_clean, log_prob, log_sum
from ..shared.kl_options import DIVERGENCES
from .problem import TAILS, Problem
from .triton_logprobs import select as select
from .triton_rows import (
    SMALLEST,
    kept_entries,
    log_student,
    row_ptr,
    slope,
    teacher_rest,
    terms,
)

# m, ln l, ln q_o, k_s, m_1, ln l_1: the order of csrc/topk_kl/topk_row.h
STATISTICS = 6
MAX_K = 256
# not measured: what compiles without spills for all four targets beside 256 kept entries. A sum of
# BLOCK_V high parts is exact up to 4096 columns
BLOCK_V = 4096
LAUNCH = {"num_warps": 8, "maxnreg": 128}


def declines(name: str, tensor: Tensor, **facts: Any) -> str | None:
    """Triton serves two- and four-byte floats and up to 256 kept tokens."""
    if tensor.dtype == torch.float64:
        return "topk_kl_distillation serves float32, bfloat16 and float16, got float64"
    if facts.get("K", 0) > MAX_K:
        return f"topk_kl_distillation serves K <= {MAX_K}, got K = {facts['K']}"
    return None


@triton.jit
def _high(e):
    """e to a multiple of 2^-11; e - _high(e) is exact."""
    return (e + 6144.0) - 6144.0


@triton.jit
def _sweep(
    student_ptr, ids, counts, s_k, V, inv_tau, TAIL: tl.constexpr, OWN_SUM: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Maximum, sum over the kept and over the others; maximum and sum of all at temperature 1."""
    k = inv_tau * LOG2E
    m, kept, outside = -1e30, 0.0, 0.0
    m_1, l_1 = -1e30, 0.0
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        s = load_clean(student_ptr, v, v < V)
        if TAIL != 2:
            n = tl.maximum(m, tl.max(s, 0))
            factor = tl.exp2((m - n) * k)
            here = counts & (ids >= start) & (ids < start + BLOCK_V)
            # of the block's own missing columns only those inside the row are outcomes
            e = tl.where(v < V, tl.exp2((s - n) * k), 0.0)
            e_k = tl.where(here, tl.exp2((s_k - n) * k), 0.0)
            high = tl.sum(_high(e), 0) - tl.sum(_high(e_k), 0)
            low = tl.sum(e - _high(e), 0) - tl.sum(e_k - _high(e_k), 0)
            rest = high + low
            outside = outside * factor + tl.where(rest < 0.0, 0.0, rest)
            kept = kept * factor + tl.sum(e_k, 0)
            m = n
        if OWN_SUM:
            m_1, l_1 = add_exp_sum(m_1, l_1, s, LOG2E)
    return m, kept, outside, m_1, l_1


@triton.jit
def _topk_forward_kernel(
    student, teacher, labels_ptr, scale_ptr, rows_ptr, stats_ptr, V, scalars,
    TAIL: tl.constexpr, DIVERGENCE: tl.constexpr, OWN_SUM: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """teacher = (ids, ln p, K), scalars = (beta, 1 / tau, kd_scale, ce_weight)."""
    t = tl.program_id(0).to(tl.int64)
    beta, inv_tau, kd_scale, ce_weight = scalars
    at = stats_ptr + t * 6
    scale = tl.load(scale_ptr + t)
    if scale == 0.0:
        tl.store(rows_ptr + t, 0.0)
        tl.store(at + tl.arange(0, 8), tl.zeros([8], tl.float32), mask=tl.arange(0, 8) < 6)
        return
    student_ptr = row_ptr(student, t)
    ids, counts, s_k, logprobs = kept_entries(student_ptr, teacher, t, V, BLOCK_K)
    m, kept, outside, m_1, l_1 = _sweep(
        student_ptr, ids, counts, s_k, V, inv_tau, TAIL, OWN_SUM, BLOCK_V
    )
    if TAIL == 2:
        m = tl.max(s_k, 0)
        # missing entries count as e^0 only as long as no other is there: then log_sum is NaN
        kept = tl.sum(tl.where(counts, tl.exp2((s_k - m) * inv_tau * LOG2E), 0.0), 0)
    ln_l = log_sum(m, kept + outside)
    if not OWN_SUM:
        m_1, l_1 = m, kept + outside
    ln_l_1 = log_sum(m_1, l_1)
    ln_q_o = 0.0
    k_s = 0.0
    loss = 0.0
    some = tl.max(counts.to(tl.int32), 0) > 0
    # a row of padding alone has no distribution under 'renormalize', and no loss
    if (kd_scale != 0.0) & (some | (TAIL != 2)):
        ln_p, _, ln_p_o = teacher_rest(logprobs, TAIL)
        ln_q = log_student(s_k, counts, m, ln_l, inv_tau)
        to_q, to_p = terms(ln_q, ln_p, beta, DIVERGENCE)
        k_s = tl.sum(to_q, 0)
        k_t = tl.sum(to_p, 0)
        if TAIL == 0:
            q_o = outside / (kept + outside)
            ln_q_o = tl.log(tl.where(q_o < SMALLEST, SMALLEST, q_o))
            to_q_o, to_p_o = terms(ln_q_o, ln_p_o, beta, DIVERGENCE)
            k_s += to_q_o
            k_t += to_p_o
        kd = k_s
        if DIVERGENCE == 2:
            kd = beta * k_t + (1.0 - beta) * k_s
        # a row without any distribution must not end as a plausible number
        loss += kd_scale * tl.where(ln_l == ln_l, kd, float("nan"))
    if labels_ptr is not None:
        label = tl.load(labels_ptr + t)
        inside = (label >= 0) & (label < V)
        at_label = tl.load(student_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
        at_label = tl.where(at_label <= MISSING, -float("inf"), at_label)
        loss += ce_weight * (m_1 + ln_l_1 - at_label)
    tl.store(rows_ptr + t, scale * loss)
    tl.store(at, m)
    tl.store(at + 1, ln_l)
    tl.store(at + 2, ln_q_o)
    tl.store(at + 3, k_s)
    tl.store(at + 4, m_1)
    tl.store(at + 5, ln_l_1)


@triton.jit
def _topk_backward_kernel(
    drows_ptr, student, teacher, labels_ptr, scale_ptr, stats_ptr, dstudent_ptr, V, scalars,
    TAIL: tl.constexpr, DIVERGENCE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """teacher = (ids, ln p, K), scalars = (beta, 1 / tau, kd_scale / tau, ce_weight)."""
    t = tl.program_id(0).to(tl.int64)
    beta, inv_tau, kd_scale, ce_weight = scalars
    scale = tl.load(scale_ptr + t)
    G = tl.load(drows_ptr + t) * scale
    out = dstudent_ptr + t * V
    lanes = tl.arange(0, BLOCK_V)
    if scale == 0.0:
        for start in range(0, V, BLOCK_V):
            zeros = tl.zeros([BLOCK_V], tl.float32).to(dstudent_ptr.dtype.element_ty)
            tl.store(out + start + lanes, zeros, mask=start + lanes < V)
        return
    at = stats_ptr + t * 6
    m = tl.load(at)
    ln_l = tl.load(at + 1)
    ln_q_o = tl.load(at + 2)
    k_s = tl.load(at + 3)
    m_1 = tl.load(at + 4)
    ln_l_1 = tl.load(at + 5)
    student_ptr = row_ptr(student, t)
    ids, counts, s_k, logprobs = kept_entries(student_ptr, teacher, t, V, BLOCK_K)
    ln_p, mass, ln_p_o = teacher_rest(logprobs, TAIL)
    ln_q = log_student(s_k, counts, m, ln_l, inv_tau)
    h = tl.where(counts, slope(ln_q, ln_p, beta, k_s, DIVERGENCE), 0.0)
    off = 0.0
    sum_h = 0.0
    if DIVERGENCE == 0:
        sum_h = -mass if TAIL != 2 else -1.0
    if TAIL == 0:
        h_o = slope(ln_q_o, ln_p_o, beta, k_s, DIVERGENCE)
        if DIVERGENCE == 0:
            sum_h += h_o
        off = h_o * tl.exp2(-ln_q_o * LOG2E) - sum_h
    if TAIL == 1:
        off = mass
    c = G * kd_scale
    on = tl.where(counts, c * (h - tl.exp2(ln_q * LOG2E) * sum_h), 0.0)
    label = -1
    hit = 1.0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + t)
        # a label outside the row: NaN, as its loss
        hit = tl.where((label >= 0) & (label < V), 1.0, float("nan"))
        soft = tl.exp2(log_prob(s_k, m_1, ln_l_1, 1.0) * LOG2E)
        on += G * ce_weight * (soft * hit - tl.where(ids == label, 1.0, 0.0))
    for start in range(0, V, BLOCK_V):
        v = start + lanes
        s = load_clean(student_ptr, v, v < V)
        dx = tl.zeros([BLOCK_V], tl.float32)
        if TAIL != 2:
            q = tl.exp2(log_prob(s, m, ln_l, inv_tau) * LOG2E)
            # without KD the row may have no statistics of its temperature
            dx = tl.where(kd_scale == 0.0, 0.0, c * off * q)
        if labels_ptr is not None:
            q_1 = tl.exp2(log_prob(s, m_1, ln_l_1, 1.0) * LOG2E)
            dx += G * ce_weight * (q_1 * hit - tl.where(v == label, 1.0, 0.0))
        tl.store(out + v, dx.to(dstudent_ptr.dtype.element_ty), mask=v < V)
    # NOTE: the sweep wrote the kept columns too; other threads' stores must have landed.
    tl.debug_barrier()
    tl.store(out + ids, on.to(dstudent_ptr.dtype.element_ty), mask=counts)


def _launch(problem: Problem) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """The student's rows, the teacher's, and what is known when compiling."""
    student, ids, logprobs = problem[:3]
    if student.stride(-1) != 1 and student.shape[-1] > 1:
        student = student.contiguous()
    V, K = student.shape[-1], ids.shape[-1]
    constants = {
        "TAIL": TAILS.index(problem.tail),
        "DIVERGENCE": DIVERGENCES.index(problem.divergence),
        "BLOCK_K": int(max(16, triton.next_power_of_2(K))),
        "BLOCK_V": int(min(BLOCK_V, max(16, triton.next_power_of_2(V)))),
        **LAUNCH,
    }
    side = (student, student.shape[1], student.stride(0), student.stride(1))
    return side, (ids.contiguous(), logprobs.float().contiguous(), K), constants


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Rows [T] times their scale, and what backward needs of each, [T, 6]."""
    student, teacher, constants = _launch(problem)
    T = problem.scale_T.shape[0]
    rows_T = problem.scale_T.new_empty(T)
    statistics = problem.scale_T.new_empty(T, STATISTICS)
    if T == 0:
        return rows_T, statistics
    own_sum = problem.labels is not None and (
        problem.temperature != 1.0 or problem.tail == "renormalize"
    )
    scalars = (problem.beta, 1 / problem.temperature, problem.kd_scale, problem.ce_weight)
    with torch.cuda.device_of(problem.student_ABV):
        _topk_forward_kernel[(T,)](
            student, teacher, problem.labels, problem.scale_T, rows_T, statistics,
            problem.student_ABV.shape[-1], scalars, OWN_SUM=own_sum, **constants,
        )  # fmt: skip
    return rows_T, statistics


def backward(problem: Problem, drows_T: Tensor, statistics: Tensor) -> Tensor:
    """Gradient [A, B, V] in the logits' dtype."""
    student, teacher, constants = _launch(problem)
    dstudent = problem.student_ABV.new_empty(problem.student_ABV.shape)
    T = problem.scale_T.shape[0]
    if T == 0:
        return dstudent
    kd_scale = problem.kd_scale / problem.temperature
    scalars = (problem.beta, 1 / problem.temperature, kd_scale, problem.ce_weight)
    with torch.cuda.device_of(problem.student_ABV):
        _topk_backward_kernel[(T,)](
            drows_T.contiguous(), student, teacher, problem.labels, problem.scale_T, statistics,
            dstudent, problem.student_ABV.shape[-1], scalars, **constants,
        )  # fmt: skip
    return dstudent
