"""layer_scale_residual_norm: the end of one half of a transformer block and the norm before the next.

    total = residual + scale * branch
    normed = (total - mean) / sqrt(variance + eps) * weight + bias          over the last dimension

Shapes: R rows, D width, both flattened from [..., D]; scale, weight and bias [D]. The statistics are fp32, taken
from the rounded total, as eager PyTorch sees it, in two passes over registers. Bytes moved for s bytes an element:
forward ``4 s R D`` (two inputs, two outputs); backward ``s R D`` for each of total, the two outputs' gradients,
each input's gradient and, with a scale, branch. The sums over rows are taken in two stages, so results repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels.common import as_rows, narrow, promoted, register, store

_PROGRAMS = 528
"""At most so many in the backward: four on each multiprocessor of an H100; fixed, so that sums repeat anywhere."""


@triton.jit
def _forward_kernel(
    p_residual,  # [R, D], any stride over R
    p_branch,  # [R, D], any stride over R
    p_scale,  # [D] or None
    p_weight,  # [D]
    p_bias,  # [D]
    p_total,  # out: [R, D] contiguous
    p_normed,  # out: [R, D] contiguous
    p_statistics,  # out: [2, R] fp32, mean and 1 / standard deviation
    stride_residual,
    stride_branch,
    R,
    eps,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_r, m_d = o_r < R, o_d < D
    m_rd = m_r[:, None] & m_d[None, :]
    p_row = p_branch + o_r[:, None] * stride_branch + o_d[None, :]
    b_branch = tl.load(p_row, mask=m_rd, other=0.0).to(tl.float32)
    p_row = p_residual + o_r[:, None] * stride_residual + o_d[None, :]
    b_residual = tl.load(p_row, mask=m_rd, other=0.0).to(tl.float32)
    if p_scale is not None:
        b_branch *= tl.load(p_scale + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    o_rd = o_r[:, None] * D + o_d[None, :]
    b_rounded = narrow(b_residual + b_branch, p_total.dtype.element_ty)
    tl.store(p_total + o_rd, b_rounded, mask=m_rd)
    b_total = b_rounded.to(tl.float32)
    b_mean = tl.sum(b_total, 1) / D
    b_centred = tl.where(m_d[None, :], b_total - b_mean[:, None], 0.0)
    # What rounding left of the mean: as large as eager's whole error where a row is far from zero.
    b_left = tl.sum(b_centred, 1) / D
    b_rstd = tl.rsqrt(tl.sum(b_centred * b_centred, 1) / D - b_left * b_left + eps)
    b_hat = (b_centred - b_left[:, None]) * b_rstd[:, None]
    store(p_normed + o_rd, b_hat * b_weight[None, :] + b_bias[None, :], m_rd)
    tl.store(p_statistics + o_r, b_mean + b_left, mask=m_r)
    tl.store(p_statistics + R + o_r, b_rstd, mask=m_r)


@triton.jit
def _through_norm(b_d_hat, b_hat, b_rstd, D: tl.constexpr):
    """The gradient of the rows from that of the normalised rows: less its parts along the mean and along b_hat."""
    b_along_mean = tl.sum(b_d_hat, 1)[:, None] / D
    b_along_hat = tl.sum(b_d_hat * b_hat, 1)[:, None] / D
    return (b_d_hat - b_along_mean - b_hat * b_along_hat) * b_rstd


@triton.jit
def _store_sum(p_sum, b_rows, mask, WANTED: tl.constexpr):
    if WANTED:
        tl.store(p_sum, tl.sum(b_rows, 0), mask=mask)


@triton.jit
def _backward_kernel(
    p_d_total,  # [R, D] contiguous or None, the gradient of total
    p_d_normed,  # [R, D] contiguous or None
    p_total,  # [R, D] contiguous
    p_statistics,  # [2, R]
    p_branch,  # [R, D], any stride over R; read for SCALE
    p_scale,  # [D] or None
    p_weight,  # [D]
    p_d_residual,  # out: [R, D]
    p_d_branch,  # out: [R, D]
    p_sums,  # out: [SCALE + WEIGHT + BIAS, programs, D] fp32
    stride_branch,
    R,
    D: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BRANCH: tl.constexpr,
    SCALE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_p, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if p_scale is not None:
        b_scale = tl.load(p_scale + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_zero = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_d_scale, b_d_weight, b_d_bias = b_zero, b_zero, b_zero
    for i_r in range(i_p * BLOCK_R, R, programs * BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = o_r < R
        m_rd = m_r[:, None] & m_d[None, :]
        o_rd = o_r[:, None] * D + o_d[None, :]
        b_d = b_zero
        if p_d_normed is not None:
            b_d_normed = tl.load(p_d_normed + o_rd, mask=m_rd, other=0.0).to(tl.float32)
            b_total = tl.load(p_total + o_rd, mask=m_rd, other=0.0).to(tl.float32)
            b_mean = tl.load(p_statistics + o_r, mask=m_r, other=0.0)[:, None]
            b_rstd = tl.load(p_statistics + R + o_r, mask=m_r, other=0.0)[:, None]
            b_hat = (b_total - b_mean) * b_rstd  # finite, not zero, beyond D, where every gradient is zero
            b_d_weight += b_d_normed * b_hat
            b_d_bias += b_d_normed
            b_d += _through_norm(b_d_normed * b_weight, b_hat, b_rstd, D)
        if p_d_total is not None:
            b_d += tl.load(p_d_total + o_rd, mask=m_rd, other=0.0).to(tl.float32)
        if RESIDUAL:
            store(p_d_residual + o_rd, b_d, m_rd)
        if SCALE:
            p_row = p_branch + o_r[:, None] * stride_branch + o_d[None, :]
            b_d_scale += b_d * tl.load(p_row, mask=m_rd, other=0.0).to(tl.float32)
        if BRANCH:
            if p_scale is not None:
                b_d *= b_scale
            store(p_d_branch + o_rd, b_d, m_rd)
    p_sum = p_sums + i_p * D + o_d
    _store_sum(p_sum, b_d_scale, m_d, SCALE)
    _store_sum(p_sum + SCALE * programs * D, b_d_weight, m_d, WEIGHT)
    _store_sum(p_sum + (SCALE + WEIGHT) * programs * D, b_d_bias, m_d, BIAS)


def _tile(width: int) -> dict[str, int]:
    """Whole rows, 2048 elements a program (16 a thread) where a row is not longer."""
    block = max(16, triton.next_power_of_2(width))
    return {"BLOCK_R": max(1, 2048 // block), "BLOCK_D": block, "num_warps": 4 if block <= 2048 else 8}


def _forward(
    residual: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape, width = residual.shape, residual.shape[-1]
    total = torch.empty(shape, dtype=promoted(residual, branch, scale), device=residual.device)
    normed = torch.empty_like(total)
    statistics = total.new_empty((2, *shape[:-1]), dtype=torch.float32)
    if total.numel() == 0:
        return total, normed, statistics
    residual, branch, tile = as_rows(residual), as_rows(branch), _tile(width)
    vectors = [None if vector is None else vector.contiguous() for vector in (scale, weight, bias)]
    _forward_kernel[(triton.cdiv(residual.shape[0], tile["BLOCK_R"]),)](
        residual, branch, *vectors, total, normed, statistics, residual.stride(0), branch.stride(0),
        residual.shape[0], eps, width, **tile,
    )  # fmt: skip
    return total, normed, statistics


def _backward(
    d_total: Tensor | None,
    d_normed: Tensor | None,
    total: Tensor,
    statistics: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    residual_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    d_residual = total.new_empty(total.shape if needs[0] else (0,), dtype=residual_dtype)
    d_branch = total.new_empty(total.shape if needs[1] else (0,), dtype=branch_dtype)
    rows, width = statistics[0].numel(), total.shape[-1]
    tile = _tile(width)
    programs = min(triton.cdiv(rows, tile["BLOCK_R"]), _PROGRAMS)
    sums = total.new_empty((sum(needs[2:]), programs, width), dtype=torch.float32)
    if total.numel():
        gradients = [None if gradient is None else gradient.contiguous() for gradient in (d_total, d_normed)]
        branch = None if branch is None else as_rows(branch)
        vectors = [None if vector is None else vector.contiguous() for vector in (scale, weight)]
        _backward_kernel[(programs,)](
            *gradients, total.contiguous(), statistics.contiguous(), branch, *vectors, d_residual, d_branch,
            sums, 0 if branch is None else branch.stride(0), rows, width, *needs, **tile,
        )  # fmt: skip
    return d_residual, d_branch, sums.sum(1)


def _forward_fake(residual, branch, scale, weight, bias, eps):
    total = torch.empty(residual.shape, dtype=promoted(residual, branch, scale), device=residual.device)
    statistics = total.new_empty((2, *residual.shape[:-1]), dtype=torch.float32)
    return total, torch.empty_like(total), statistics


def _backward_fake(
    d_total, d_normed, total, statistics, branch, scale, weight, residual_dtype, branch_dtype, needs
):
    return (
        total.new_empty(total.shape if needs[0] else (0,), dtype=residual_dtype),
        total.new_empty(total.shape if needs[1] else (0,), dtype=branch_dtype),
        total.new_empty((sum(needs[2:]), total.shape[-1]), dtype=torch.float32),
    )


forward_op = register(
    "layer_scale_residual_norm",
    "(Tensor residual, Tensor branch, Tensor? scale, Tensor weight, Tensor bias, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward_op = register(
    "layer_scale_residual_norm_backward",
    "(Tensor? d_total, Tensor? d_normed, Tensor total, Tensor statistics, Tensor? branch, Tensor? scale, "
    "Tensor weight, ScalarType residual_dtype, ScalarType branch_dtype, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _LayerScaleResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, branch, scale, weight, bias, eps):
        if not torch.compiler.is_compiling():  # torch.compile has no None for an unused output's gradient
            ctx.set_materialize_grads(False)
        total, normed, statistics = forward_op(residual, branch, scale, weight, bias, eps)
        ctx.save_for_backward(total, statistics, None if scale is None else branch, scale, weight)
        ctx.dtypes = [None if x is None else x.dtype for x in (residual, branch, scale, weight, bias)]
        return total, normed

    @staticmethod
    def backward(ctx, d_total, d_normed):
        if d_total is None and d_normed is None:
            return (None,) * 6
        total, statistics, branch, scale, weight = ctx.saved_tensors
        need_residual, need_branch, *need_vectors, _ = ctx.needs_input_grad
        if d_normed is None:
            need_vectors[1:] = False, False
        # Without a scale, inputs of one dtype have one gradient, written once, as those of an addition in eager.
        shared = scale is None and ctx.dtypes[0] == ctx.dtypes[1]
        written = [need_residual or need_branch, False] if shared else [need_residual, need_branch]
        d_residual, d_branch, sums = backward_op(
            d_total, d_normed, total, statistics, branch, scale, weight, *ctx.dtypes[:2], written + need_vectors
        )  # fmt: skip
        d_branch, rows = d_residual if shared else d_branch, iter(sums)
        vectors = zip(need_vectors, ctx.dtypes[2:], strict=True)
        return (
            d_residual if need_residual else None,
            d_branch if need_branch else None,
            *(next(rows).to(dtype) if need else None for need, dtype in vectors),
            None,
        )


def layer_scale_residual_norm(
    residual: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """residual + scale * branch and its LayerNorm, in one pass.

    Args:
        residual, branch: [..., D] fp32, bf16 or fp16.
        scale: [D], LayerScale; None = 1.
        weight, bias: [D], of the LayerNorm, of any of these dtypes.
        eps: added to the variance.

    Returns:
        The sum and its norm, both of the promoted dtype of residual, branch and scale.
    """
    return _LayerScaleResidualNorm.apply(residual, branch, scale, weight, bias, eps)
