"""The backward kernels of `softcap_attention`: dq, and dk with dv. Conventions as in the forward."""

import triton
import triton.language as tl

from fastalign.kernels.common import narrow
from fastalign.kernels.softcap_attention_forward import (
    LOG2_E,
    clear,
    dot,
    dot2,
    exponential,
    head,
    load2,
    logits,
    place,
    store2,
)


@triton.jit
def _rows(p_rows, o_t):
    """Pointers [rows, 2] to the pairs that dq writes, so that one load reads both."""
    return p_rows + 2 * o_t[:, None] + tl.arange(0, 2)[None, :]


@triton.jit
def _dq_step(
    b_dq0, b_dq1, b_q0, b_q1, b_do0, b_do1, b_lse, b_delta, p_k, p_v, stride_k, stride_v, o_n, length, to_tanh,
    to_logit, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CAP: tl.constexpr, FAST: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """One step of dq, over the keys o_n."""
    b_k0, b_k1 = load2(p_k, stride_k, o_n, length, D, D0, D1, MASK)
    b_v0, b_v1 = load2(p_v, stride_v, o_n, length, D, D0, D1, MASK)
    b_x, b_tanh = logits(dot2(b_q0, b_q1, b_k0, b_k1, D1), to_tanh, to_logit, CAP, FAST)
    if MASK:
        # A masked key is zero, but its logit of zero may exceed all others: inf * 0.
        b_x = tl.where((o_n < length)[None, :], b_x, -float("inf"))
    b_ds = exponential(b_x - b_lse[:, None], FAST) * (dot2(b_do0, b_do1, b_v0, b_v1, D1) - b_delta[:, None])
    if CAP:
        b_ds *= 1.0 - b_tanh * b_tanh
    b_ds = narrow(b_ds, b_k0.dtype)
    b_dq0 += dot(b_ds, b_k0)
    if D1 > 0:
        b_dq1 += dot(b_ds, b_k1)
    return b_dq0, b_dq1


@triton.jit
def dq_kernel(
    p_q, p_k, p_v, p_do, p_out, p_lse, p_rows, p_dq,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt,
    p_bounds, ROWS, SEQUENCES, T, to_tanh, to_logit, scale,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CAP: tl.constexpr,
    STATIC: tl.constexpr, FAST: tl.constexpr, WIDEST: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    WALK: tl.constexpr,
):  # fmt: skip
    """dq for a block of queries, and for dkdv [lse, sum(out * do)] of each, lse in the units of the logits."""
    i_s, i_h, i_row, start, length, i_lse = place(p_bounds, ROWS, SEQUENCES, T, H, BLOCK)
    if i_row >= length:
        clear(p_dq, 0.0, i_h, i_row, start, -length, T, D, H, BLOCK, WIDEST)
        return
    PACKED: tl.constexpr = p_bounds is not None
    p_q, stride_qt = head(p_q, stride_qb, stride_qh, stride_qt, i_s, i_h, start, UNIT, PACKED)
    p_k, stride_kt = head(p_k, stride_kb, stride_kh, stride_kt, i_s, i_h, start, UNIT, PACKED)
    p_v, stride_vt = head(p_v, stride_vb, stride_vh, stride_vt, i_s, i_h, start, UNIT, PACKED)
    p_do, stride_dt = head(p_do, stride_db, stride_dh, stride_dt, i_s, i_h, start, UNIT, PACKED)
    p_out += (start * H + i_h) * D
    o_t = i_row + tl.arange(0, BLOCK)
    b_q0, b_q1 = load2(p_q, stride_qt, o_t, length, D, D0, D1, True)
    b_do0, b_do1 = load2(p_do, stride_dt, o_t, length, D, D0, D1, True)
    b_out0, b_out1 = load2(p_out, H * D, o_t, length, D, D0, D1, True)
    b_delta = tl.sum(b_out0.to(tl.float32) * b_do0.to(tl.float32), 1)
    if D1 > 0:
        b_delta += tl.sum(b_out1.to(tl.float32) * b_do1.to(tl.float32), 1)
    b_lse = tl.load(p_lse + i_lse + o_t, mask=o_t < length, other=float("inf"))
    if FAST:
        b_lse *= LOG2_E
    tl.store(_rows(p_rows + 2 * i_lse, o_t), tl.join(b_lse, b_delta), mask=(o_t < length)[:, None])
    b_dq0 = tl.zeros([BLOCK, D0], tl.float32)
    b_dq1 = tl.zeros([BLOCK, D1 if D1 > 0 else 16], tl.float32)
    whole = length // WALK * WALK
    for i_n in range(0, whole, WALK):
        b_dq0, b_dq1 = _dq_step(
            b_dq0, b_dq1, b_q0, b_q1, b_do0, b_do1, b_lse, b_delta, p_k, p_v, stride_kt, stride_vt,
            i_n + tl.arange(0, WALK), length, to_tanh, to_logit, D, D0, D1, CAP, FAST, False,
        )  # fmt: skip
    for i_n in range(whole, length, 16):
        b_dq0, b_dq1 = _dq_step(
            b_dq0, b_dq1, b_q0, b_q1, b_do0, b_do1, b_lse, b_delta, p_k, p_v, stride_kt, stride_vt,
            i_n + tl.arange(0, 16), length, to_tanh, to_logit, D, D0, D1, CAP, FAST, True,
        )  # fmt: skip
    p_dq += (start * H + i_h) * D
    store2(p_dq, H * D, o_t, b_dq0 * scale, b_dq1 * scale, length, D, D0, D1)


@triton.jit
def _dkdv_step(
    b_dk0, b_dk1, b_dv0, b_dv1, b_k0, b_k1, b_v0, b_v1, p_q, p_do, p_rows, stride_q, stride_d, o_m, length, to_tanh,
    to_logit, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CAP: tl.constexpr, FAST: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """One step of dk and dv, over the queries o_m. Those beyond the end are zeros, which add nothing."""
    b_q0, b_q1 = load2(p_q, stride_q, o_m, length, D, D0, D1, MASK)
    b_do0, b_do1 = load2(p_do, stride_d, o_m, length, D, D0, D1, MASK)
    if MASK:
        b_rows = tl.load(_rows(p_rows, o_m), mask=(o_m < length)[:, None], other=0.0)
    else:
        b_rows = tl.load(_rows(p_rows, o_m))
    b_lse, b_delta = tl.split(b_rows)
    b_s = dot2(b_k0, b_k1, b_q0, b_q1, D1)
    b_dp = dot2(b_v0, b_v1, b_do0, b_do1, D1)
    b_x, b_tanh = logits(b_s, to_tanh, to_logit, CAP, FAST)
    b_p = exponential(b_x - b_lse[None, :], FAST)
    b_weight = narrow(b_p, b_do0.dtype)
    b_dv0 += dot(b_weight, b_do0)
    if D1 > 0:
        b_dv1 += dot(b_weight, b_do1)
    b_ds = b_p * (b_dp - b_delta[None, :])
    if CAP:
        b_ds *= 1.0 - b_tanh * b_tanh
    b_ds = narrow(b_ds, b_q0.dtype)
    b_dk0 += dot(b_ds, b_q0)
    if D1 > 0:
        b_dk1 += dot(b_ds, b_q1)
    return b_dk0, b_dk1, b_dv0, b_dv1


@triton.jit
def dkdv_kernel(
    p_q, p_k, p_v, p_do, p_rows, p_dk, p_dv,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt,
    p_bounds, ROWS, SEQUENCES, T, to_tanh, to_logit, scale,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CAP: tl.constexpr,
    STATIC: tl.constexpr, FAST: tl.constexpr, WIDEST: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    WALK: tl.constexpr,
):  # fmt: skip
    """dk and dv for a block of keys."""
    i_s, i_h, i_row, start, length, i_lse = place(p_bounds, ROWS, SEQUENCES, T, H, BLOCK)
    if i_row >= length:
        clear(p_dk, 0.0, i_h, i_row, start, -length, T, D, H, BLOCK, WIDEST)
        clear(p_dv, 0.0, i_h, i_row, start, -length, T, D, H, BLOCK, WIDEST)
        return
    PACKED: tl.constexpr = p_bounds is not None
    p_q, stride_qt = head(p_q, stride_qb, stride_qh, stride_qt, i_s, i_h, start, UNIT, PACKED)
    p_k, stride_kt = head(p_k, stride_kb, stride_kh, stride_kt, i_s, i_h, start, UNIT, PACKED)
    p_v, stride_vt = head(p_v, stride_vb, stride_vh, stride_vt, i_s, i_h, start, UNIT, PACKED)
    p_do, stride_dt = head(p_do, stride_db, stride_dh, stride_dt, i_s, i_h, start, UNIT, PACKED)
    o_t = i_row + tl.arange(0, BLOCK)
    b_k0, b_k1 = load2(p_k, stride_kt, o_t, length, D, D0, D1, True)
    b_v0, b_v1 = load2(p_v, stride_vt, o_t, length, D, D0, D1, True)
    b_dk0 = tl.zeros([BLOCK, D0], tl.float32)
    b_dv0 = tl.zeros([BLOCK, D0], tl.float32)
    b_dk1 = tl.zeros([BLOCK, D1 if D1 > 0 else 16], tl.float32)
    b_dv1 = tl.zeros([BLOCK, D1 if D1 > 0 else 16], tl.float32)
    p_rows += 2 * i_lse
    # If whole blocks have their own loop, the rest precedes it: after it, the rest makes ptxas wait for each of the
    # loop's matrix instructions, and so does any second loop where blocks are small and heads are wide.
    SPLIT: tl.constexpr = WALK > 32
    REST: tl.constexpr = 16 if SPLIT else WALK
    whole = length // WALK * WALK if SPLIT else 0
    for i_m in range(whole, length, REST):
        b_dk0, b_dk1, b_dv0, b_dv1 = _dkdv_step(
            b_dk0, b_dk1, b_dv0, b_dv1, b_k0, b_k1, b_v0, b_v1, p_q, p_do, p_rows, stride_qt, stride_dt,
            i_m + tl.arange(0, REST), length, to_tanh, to_logit, D, D0, D1, CAP, FAST, True,
        )  # fmt: skip
    if SPLIT:
        for i_m in range(0, whole, WALK):
            b_dk0, b_dk1, b_dv0, b_dv1 = _dkdv_step(
                b_dk0, b_dk1, b_dv0, b_dv1, b_k0, b_k1, b_v0, b_v1, p_q, p_do, p_rows, stride_qt, stride_dt,
                i_m + tl.arange(0, WALK), length, to_tanh, to_logit, D, D0, D1, CAP, FAST, False,
            )  # fmt: skip
    store2(p_dk + (start * H + i_h) * D, H * D, o_t, b_dk0 * scale, b_dk1 * scale, length, D, D0, D1)
    store2(p_dv + (start * H + i_h) * D, H * D, o_t, b_dv0, b_dv1, length, D, D0, D1)
