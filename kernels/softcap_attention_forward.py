"""The forward kernel of `softcap_attention`, and the parts it shares with the backward.

Each program owns BLOCK rows of one head of one sequence, queries (forward, dq) or keys (dkdv), and loops over the
other side in blocks of WALK rows without a mask, then in steps of 16. Channels are two tiles, D0 and D1 (0 = none).

In 16 bits (FAST) `to_logit` includes log2(e), and the hardware's base-2 exponential is used. In fp32 logits stay in
natural units, because the factor costs a digit of large logits. The forward's `lse` is natural in both.
"""

import triton
import triton.language as tl

from fastalign.kernels.common import INTERPRETED, exp2, narrow, store, tanh

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b):
    """Matrix product with fp32 accumulation, without TF32 for fp32; the interpreter does not support bf16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot2(a0, a1, b0, b1, D1: tl.constexpr):
    """a b^T over both tiles of channels."""
    b_x = dot(a0, tl.trans(b0))
    if D1 > 0:
        b_x += dot(a1, tl.trans(b1))
    return b_x


@triton.jit
def _load(p_x, stride_t, o_t, o_d, length, D: tl.constexpr, MASK_T: tl.constexpr, MASK_D: tl.constexpr):
    """Rows of a head, [rows, channels]; zeros where masked."""
    p_row = p_x + o_t[:, None] * stride_t + o_d[None, :]
    if MASK_T and MASK_D:
        return tl.load(p_row, mask=(o_t < length)[:, None] & (o_d < D)[None, :], other=0.0)
    if MASK_T:
        return tl.load(p_row, mask=(o_t < length)[:, None], other=0.0)
    if MASK_D:
        return tl.load(p_row, mask=(o_d < D)[None, :], other=0.0)
    return tl.load(p_row)


@triton.jit
def load2(
    p_x, stride_t, o_t, length, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASK_T: tl.constexpr
):
    """Both tiles of channels; without a second tile the second result is unused."""
    b_0 = _load(p_x, stride_t, o_t, tl.arange(0, D0), length, D, MASK_T, D0 > D)
    b_1 = b_0
    if D1 > 0:
        b_1 = _load(p_x, stride_t, o_t, D0 + tl.arange(0, D1), length, D, MASK_T, D0 + D1 > D)
    return b_0, b_1


@triton.jit
def store2(p_x, stride_t, o_t, b_0, b_1, length, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Store rows of a head, both tiles of channels, without those beyond the length and D."""
    o_d = tl.arange(0, D0)
    store(p_x + o_t[:, None] * stride_t + o_d[None, :], b_0, (o_t < length)[:, None] & (o_d < D)[None, :])
    if D1 > 0:
        o_d = D0 + tl.arange(0, D1)
        store(p_x + o_t[:, None] * stride_t + o_d[None, :], b_1, (o_t < length)[:, None] & (o_d < D)[None, :])


@triton.jit
def place(p_bounds, ROWS, SEQUENCES, T, H: tl.constexpr, BLOCK: tl.constexpr):
    """Sequence, head, first row in the block, first row in memory, length and offset in `lse` of this program.

    After the last packed sequence the length is minus the number of padding rows.
    """
    blocks = tl.cdiv(T, BLOCK)
    i_head = tl.program_id(0) // blocks
    i_s, i_h = (i_head // H).to(tl.int64), (i_head % H).to(tl.int64)
    i_row = tl.program_id(0) % blocks * BLOCK
    if p_bounds is not None:
        start = tl.load(p_bounds + i_s).to(tl.int64)
        end = tl.load(p_bounds + i_s + 1, mask=i_s < SEQUENCES, other=0)
        length = tl.where(i_s < SEQUENCES, end - start, start - ROWS).to(tl.int32)
        i_lse = i_h * ROWS + start
    else:
        start, length, i_lse = i_s * T, T, (i_s * H + i_h) * T
    return i_s, i_h, i_row, start, length, i_lse


@triton.jit
def head(p_x, stride_b, stride_h, stride_t, i_s, i_h, start, UNIT: tl.constexpr, PACKED: tl.constexpr):
    """Pointer to the first row of a sequence's head, and the stride from row to row."""
    i_x = i_s * stride_b + i_h * stride_h
    if PACKED:
        i_x += start * stride_t
    return p_x + i_x * UNIT, stride_t * UNIT


@triton.jit
def clear(
    p_x, value, i_h, i_row, start, rows, T,
    D: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, WIDEST: tl.constexpr,
):  # fmt: skip
    """Fill all channels of the given rows of one head; the programs of the head share the rows."""
    o_d = tl.arange(0, WIDEST)
    for i_first in range(i_row, rows, tl.cdiv(T, BLOCK) * BLOCK):
        o_t = i_first + tl.arange(0, BLOCK)
        p_row = p_x + ((start + o_t[:, None]) * H + i_h) * D + o_d[None, :]
        store(p_row, tl.full([BLOCK, WIDEST], value, tl.float32), (o_t < rows)[:, None] & (o_d < D)[None, :])


@triton.jit
def logits(b_s, to_tanh, to_logit, CAP: tl.constexpr, FAST: tl.constexpr):
    """Logits in the units of `exponential`, and the tanh (without a cap the product itself)."""
    if CAP:
        b_tanh = tanh(b_s * to_tanh, FAST)
        return b_tanh * to_logit, b_tanh
    return b_s * to_logit, b_s


@triton.jit
def exponential(b_x, FAST: tl.constexpr):
    """e to the power of logits."""
    if FAST:
        return exp2(b_x)
    return tl.exp(b_x)


@triton.jit
def _attend(
    b_acc0, b_acc1, b_max, b_sum, b_q0, b_q1, p_k, p_v, stride_k, stride_v, o_n, length, to_tanh, to_logit,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CAP: tl.constexpr, STATIC: tl.constexpr,
    FAST: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One step of the forward pass, over the keys o_n."""
    b_k0, b_k1 = load2(p_k, stride_k, o_n, length, D, D0, D1, MASK)
    b_v0, b_v1 = load2(p_v, stride_v, o_n, length, D, D0, D1, MASK)
    b_x, _ = logits(dot2(b_q0, b_q1, b_k0, b_k1, D1), to_tanh, to_logit, CAP, FAST)
    if MASK:
        b_x = tl.where((o_n < length)[None, :], b_x, -float("inf"))
    if STATIC:
        b_p = exponential(b_x, FAST)
    else:
        b_higher = tl.maximum(b_max, tl.max(b_x, 1))
        b_shrink = exponential(b_max - b_higher, FAST)
        b_p = exponential(b_x - b_higher[:, None], FAST)
        b_sum, b_max = b_sum * b_shrink, b_higher
        b_acc0 *= b_shrink[:, None]
        if D1 > 0:
            b_acc1 *= b_shrink[:, None]
    b_sum += tl.sum(b_p, 1)
    b_p = narrow(b_p, b_v0.dtype)
    b_acc0 += dot(b_p, b_v0)
    if D1 > 0:
        b_acc1 += dot(b_p, b_v1)
    return b_acc0, b_acc1, b_max, b_sum


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_out, p_lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    p_bounds, ROWS, SEQUENCES, T, to_tanh, to_logit, scale,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CAP: tl.constexpr,
    STATIC: tl.constexpr, FAST: tl.constexpr, WIDEST: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    WALK: tl.constexpr,
):  # fmt: skip
    """out and lse, the logarithm of each row's sum, for a block of queries."""
    i_s, i_h, i_row, start, length, i_lse = place(p_bounds, ROWS, SEQUENCES, T, H, BLOCK)
    if i_row >= length:
        clear(p_out, 0.0, i_h, i_row, start, -length, T, D, H, BLOCK, WIDEST)
        return
    if p_bounds is not None:
        # Rows beyond max_seqlen, which no program reaches, become NaN.
        clear(p_out, float("nan"), i_h, i_row, start + T, length - T, T, D, H, BLOCK, WIDEST)
    PACKED: tl.constexpr = p_bounds is not None
    p_q, stride_qt = head(p_q, stride_qb, stride_qh, stride_qt, i_s, i_h, start, UNIT, PACKED)
    p_k, stride_kt = head(p_k, stride_kb, stride_kh, stride_kt, i_s, i_h, start, UNIT, PACKED)
    p_v, stride_vt = head(p_v, stride_vb, stride_vh, stride_vt, i_s, i_h, start, UNIT, PACKED)
    o_t = i_row + tl.arange(0, BLOCK)
    b_q0, b_q1 = load2(p_q, stride_qt, o_t, length, D, D0, D1, True)
    b_max = tl.full([BLOCK], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_acc0 = tl.zeros([BLOCK, D0], tl.float32)
    b_acc1 = tl.zeros([BLOCK, D1 if D1 > 0 else 16], tl.float32)
    whole = length // WALK * WALK
    for i_n in range(0, whole, WALK):
        b_acc0, b_acc1, b_max, b_sum = _attend(
            b_acc0, b_acc1, b_max, b_sum, b_q0, b_q1, p_k, p_v, stride_kt, stride_vt, i_n + tl.arange(0, WALK),
            length, to_tanh, to_logit, D, D0, D1, CAP, STATIC, FAST, False,
        )  # fmt: skip
    for i_n in range(whole, length, 16):
        b_acc0, b_acc1, b_max, b_sum = _attend(
            b_acc0, b_acc1, b_max, b_sum, b_q0, b_q1, p_k, p_v, stride_kt, stride_vt, i_n + tl.arange(0, 16),
            length, to_tanh, to_logit, D, D0, D1, CAP, STATIC, FAST, True,
        )  # fmt: skip
    b_over = (1.0 / b_sum)[:, None]
    p_out += (start * H + i_h) * D
    store2(p_out, H * D, o_t, b_acc0 * b_over, b_acc1 * b_over, length, D, D0, D1)
    b_lse = tl.log(b_sum)
    if not STATIC:
        b_lse += b_max / LOG2_E if FAST else b_max
    tl.store(p_lse + i_lse + o_t, b_lse, mask=o_t < length)
