"""bias_activation: the bias of a linear layer and the activation after it.

    out = activation(x + bias)          gelu (exact) | gelu_tanh | quick_gelu: h sigmoid(1.702 h)

Shapes: R rows, D width, flattened from [..., D]; bias [D]. All in fp32 between the load and the store: x + bias
is not rounded. Bytes moved for s bytes an element: forward ``2 s R D``, backward ``3 s R D``; only x is kept.
The bias's gradient is summed in the same pass, in two stages, so results repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels.common import as_rows, promoted, register, store

_PROGRAMS = 1056
"""About so many in the backward: eight on each multiprocessor of an H100; fixed, so that sums repeat anywhere."""


@triton.jit
def _sigmoid(x):
    """The sigmoid and its derivative, neither of which cancels or overflows."""
    b_exp = tl.exp(-tl.abs(x))
    b_large = 1.0 / (1.0 + b_exp)
    b_small = b_exp * b_large
    return tl.where(x < 0.0, b_small, b_large), b_small * b_large


@triton.jit
def _activation(h, ACTIVATION: tl.constexpr):
    """The function, h times a gate, and its derivative; what is not used costs nothing."""
    if ACTIVATION == "gelu":
        b_gate = 0.5 + 0.5 * tl.math.erf(h * 0.7071067811865476)
        b_slope = 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2 u.
        b_square = 0.044715 * h * h
        b_gate, b_sigmoid = _sigmoid(1.5957691216057308 * h * (1.0 + b_square))
        b_slope = 1.5957691216057308 * (1.0 + 3.0 * b_square) * b_sigmoid
    else:
        tl.static_assert(ACTIVATION == "quick_gelu", "activation: gelu, gelu_tanh or quick_gelu")
        b_gate, b_sigmoid = _sigmoid(1.702 * h)
        b_slope = 1.702 * b_sigmoid
    return h * b_gate, b_gate + h * b_slope


@triton.jit
def _forward_kernel(
    p_x,  # [R, D], any stride over R
    p_bias,  # [D] or None
    p_out,  # [R, D] contiguous
    stride_x,
    R,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_r, i_d = tl.program_id(0).to(tl.int64) // tl.cdiv(D, BLOCK_D), tl.program_id(0) % tl.cdiv(D, BLOCK_D)
    o_r = (i_r * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    o_d = (i_d * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    m_rd = (o_r < R) & (o_d < D)
    b_x = tl.load(p_x + o_r * stride_x + o_d, mask=m_rd, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_x += tl.load(p_bias + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_out, _ = _activation(b_x, ACTIVATION)
    store(p_out + o_r * D + o_d, b_out, m_rd)


@triton.jit
def _backward_kernel(
    p_gradient,  # [R, D] contiguous
    p_x,  # [R, D], any stride over R
    p_bias,  # [D] or None
    p_d_x,  # out: [R, D]
    p_d_bias,  # out: [chunks, D] fp32, the sum over each chunk's rows
    stride_x,
    R,
    D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    X: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_chunk = tl.program_id(1).to(tl.int64)
    o_d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    b_bias = tl.zeros([1, BLOCK_D], tl.float32)
    if p_bias is not None:
        b_bias += tl.load(p_bias + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_d_bias = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i_r in range(i_chunk * BLOCK_R, R, tl.num_programs(1) * BLOCK_R):
        o_r = (i_r + tl.arange(0, BLOCK_R))[:, None]
        m_rd = (o_r < R) & (o_d < D)
        b_x = tl.load(p_x + o_r * stride_x + o_d, mask=m_rd, other=0.0).to(tl.float32)
        b_gradient = tl.load(p_gradient + o_r * D + o_d, mask=m_rd, other=0.0).to(tl.float32)
        _, b_slope = _activation(b_x + b_bias, ACTIVATION)
        b_d = b_gradient * b_slope
        b_d_bias += b_d
        if X:
            store(p_d_x + o_r * D + o_d, b_d, m_rd)
    if BIAS:
        p_sum = p_d_bias + i_chunk * D + o_d
        tl.store(p_sum, tl.sum(b_d_bias, 0)[None, :], mask=o_d < D)


def _tile(width: int) -> dict[str, int]:
    """2048 elements a program, 16 a thread; up to 256 channels, which divide most widths."""
    block = min(256, max(16, triton.next_power_of_2(width)))
    return {"BLOCK_R": 2048 // block, "BLOCK_D": block, "num_warps": 4}


def _forward(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    out = torch.empty(x.shape, dtype=promoted(x, bias), device=x.device)
    if out.numel() == 0:
        return out
    rows, width, tile = as_rows(x), x.shape[-1], _tile(x.shape[-1])
    grid = triton.cdiv(rows.shape[0], tile["BLOCK_R"]) * triton.cdiv(width, tile["BLOCK_D"])
    _forward_kernel[(grid,)](
        rows, None if bias is None else bias.contiguous(), out, rows.stride(0), rows.shape[0], width,
        activation, **tile,
    )  # fmt: skip
    return out


def _backward(
    gradient: Tensor, x: Tensor, bias: Tensor | None, activation: str, need_x: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    count, width = x.shape[:-1].numel(), x.shape[-1]
    tile = _tile(width)
    tiles = triton.cdiv(width, tile["BLOCK_D"])
    chunks = min(triton.cdiv(count, tile["BLOCK_R"]), triton.cdiv(_PROGRAMS, max(tiles, 1)))
    d_x = torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device)
    d_bias = x.new_empty((chunks, width) if need_bias else (0,), dtype=torch.float32)
    if x.numel():
        rows = as_rows(x)
        _backward_kernel[(tiles, chunks)](
            gradient.contiguous(), rows, None if bias is None else bias.contiguous(), d_x, d_bias,
            rows.stride(0), count, width, activation, need_x, need_bias, **tile,
        )  # fmt: skip
    return d_x, d_bias.sum(0) if need_bias else d_bias


def _forward_fake(x, bias, activation):
    return torch.empty(x.shape, dtype=promoted(x, bias), device=x.device)


def _backward_fake(gradient, x, bias, activation, need_x, need_bias):
    return (
        torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device),
        x.new_empty((x.shape[-1],) if need_bias else (0,), dtype=torch.float32),
    )


forward_op = register(
    "bias_activation", "(Tensor x, Tensor? bias, str activation) -> Tensor", _forward, _forward_fake
)
backward_op = register(
    "bias_activation_backward",
    "(Tensor gradient, Tensor x, Tensor? bias, str activation, bool need_x, bool need_bias) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _BiasActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, activation):
        ctx.save_for_backward(x, bias)
        ctx.activation = activation
        return forward_op(x, bias, activation)

    @staticmethod
    def backward(ctx, gradient):
        x, bias = ctx.saved_tensors
        need_x, need_bias, _ = ctx.needs_input_grad
        d_x, d_bias = backward_op(gradient, x, bias, ctx.activation, need_x, need_bias)
        return d_x if need_x else None, d_bias.to(bias.dtype) if need_bias else None, None


def bias_activation(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """activation(x + bias), in one pass.

    Args:
        x: [..., D] fp32, bf16 or fp16.
        bias: [D], of any of these dtypes; None = 0.
        activation: gelu, gelu_tanh or quick_gelu.

    Returns:
        [..., D], the promoted dtype of x and bias.
    """
    return _BiasActivation.apply(x, bias, activation)
