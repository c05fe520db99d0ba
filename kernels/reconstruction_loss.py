"""reconstruction_loss: the loss between prediction and scaled target, and its gradient from the same read.

    loss = sum over rows r of w[r] * distance(prediction[r], scale * target[r]) / count

A row is a token of width D; w is 1 for tokens that count, else 0, and such rows are not read. Rows are [B, M, T] (B
images, M masks, T tokens) or L packed rows. Bytes moved at s bytes per element: ``3 s BMTD``, prediction, target
and gradient once each, five without this kernel. Accumulates in fp32, partial sums in float64, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels.common import is_fake, register, store, with_unit_stride

_EPS = tl.constexpr(1e-8)  # of torch's cosine_similarity


@triton.jit
def _rows(
    p_visible, p_indices, p_end, stride_b, stride_m, stride_t, o_row, R, T, P, N, M,
    D: tl.constexpr, LOSS: tl.constexpr, PREFIX_COUNTS: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """The offset of each row's target, whether the row counts, and one over the number of rows."""
    m_row = o_row < R
    if p_indices is not None:
        o_source = tl.load(p_indices + o_row, mask=m_row, other=-1).to(tl.int64)
        o_target = (o_source if GATHER else o_row) * D
        m_count = o_source >= 0
        if LOSS == "masked_mse":
            m_count = m_count & PREFIX_COUNTS & (o_source % T < P)
        per_row = 1.0 / tl.load(p_end).to(tl.float32)
    else:
        o_t, i_copy = o_row % T, o_row // T
        o_target = i_copy // M * stride_b + i_copy % M * stride_m + o_t * stride_t
        m_count = m_row
        if LOSS == "masked_mse" or LOSS == "unmasked_mse":
            m_patch = m_row & (o_t >= P)
            b_visible = tl.load(p_visible + i_copy * N + o_t - P, mask=m_patch, other=0) != 0
            m_count = m_row & tl.where(m_patch, b_visible == (LOSS == "unmasked_mse"), PREFIX_COUNTS)
        per_row = 1.0 / (R * 1.0)  # not R.to(): Triton passes R = 1 as a constant, which has none
    return o_target, m_count, per_row


@triton.jit
def _cosine(b_prediction, b_target, m_count, per_row):
    """Loss of whole rows, and its gradient."""
    length = tl.sqrt(tl.sum(b_prediction * b_prediction, 1))
    one_over = 1.0 / tl.maximum(length, _EPS)
    b_target *= 1.0 / tl.maximum(tl.sqrt(tl.sum(b_target * b_target, 1)), _EPS)[:, None]
    b_cosine = tl.sum(b_prediction * b_target, 1) * one_over
    # The norm of a zero vector has gradient zero.
    b_along = b_cosine / tl.maximum(length, 1e-30)
    b_gradient = (b_prediction * b_along[:, None] - b_target) * (one_over * per_row)[:, None]
    return tl.where(m_count, (1.0 - b_cosine) * per_row, 0.0), b_gradient


@triton.jit
def _distance(b_difference, per_element, LOSS: tl.constexpr):
    """Loss of a part of each row, and its gradient."""
    if LOSS == "l1":
        b_loss = tl.sum(tl.abs(b_difference), 1) * per_element
        b_sign = tl.where(b_difference > 0, 1.0, tl.where(b_difference < 0, -1.0, 0.0))
        # NaN must not become zero.
        b_gradient = tl.where(b_difference == b_difference, b_sign, b_difference) * per_element
    else:
        b_loss = tl.sum(b_difference * b_difference, 1) * per_element
        b_gradient = 2.0 * b_difference * per_element
    return b_loss, b_gradient


@triton.jit
def _forward_kernel(
    p_prediction,  # [R, D] contiguous
    p_target,  # [B, M, T, D] with any strides, or packed: [L, D], or [B T, D] with GATHER
    p_visible,  # [B, M, N] contiguous
    p_scale,  # [] fp32
    p_indices,  # [L] or None
    p_end,  # [1], the number of packed tokens, or None
    p_gradient,  # out: [R, D] or None
    p_loss,  # out: [programs] fp32
    stride_b, stride_m, stride_t, R, T, P, N, M,
    D: tl.constexpr, LOSS: tl.constexpr, PREFIX_COUNTS: tl.constexpr, GATHER: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_target, m_count, per_row = _rows(
        p_visible, p_indices, p_end, stride_b, stride_m, stride_t, o_row, R, T, P, N, M,
        D, LOSS, PREFIX_COUNTS, GATHER,
    )  # fmt: skip
    scale = tl.load(p_scale)
    b_loss = tl.zeros([BLOCK_R], tl.float32)
    for i_d in tl.static_range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = (o_d < D)[None, :]
        m_read = m_count[:, None] & m_d
        o_out = o_row[:, None] * D + o_d[None, :]
        b_prediction = tl.load(p_prediction + o_out, mask=m_read, other=0.0).to(tl.float32)
        b_target = tl.load(p_target + o_target[:, None] + o_d[None, :], mask=m_read, other=0.0).to(tl.float32)
        if LOSS == "cosine":
            b_part, b_gradient = _cosine(b_prediction, b_target * scale, m_count, per_row)
        else:
            b_part, b_gradient = _distance(b_prediction - b_target * scale, per_row / D, LOSS)
        b_loss += b_part
        if p_gradient is not None:
            store(p_gradient + o_out, b_gradient, (o_row < R)[:, None] & m_d)
    tl.store(p_loss + tl.program_id(0), tl.sum(b_loss, 0))


@triton.jit
def _scale_kernel(p_gradient, p_factor, SIZE, BLOCK: tl.constexpr):
    """Scale the gradient in place. A factor of one, the usual case, costs only the launch."""
    factor = tl.load(p_factor).to(tl.float32)
    if factor != 1.0:
        for i_x in range(tl.program_id(0).to(tl.int64) * BLOCK, SIZE, tl.num_programs(0) * BLOCK):
            o_x = i_x + tl.arange(0, BLOCK)
            b_x = tl.load(p_gradient + o_x, mask=o_x < SIZE, other=0.0).to(tl.float32)
            store(p_gradient + o_x, b_x * factor, o_x < SIZE)


def _tile(loss: str, width: int) -> dict[str, int]:
    """The tile: the cosine needs a whole row at once; the others loop over it."""
    whole = triton.next_power_of_2(width)
    if loss != "cosine":
        return {"BLOCK_R": 4, "BLOCK_D": min(256, whole), "num_warps": 4}
    rows, warps = max(1, min(4, 2048 // whole)), 8 if whole > 2048 else 4
    return {"BLOCK_R": rows, "BLOCK_D": whole, "num_warps": warps}


@register("reconstruction_loss")
def forward_op(
    prediction: Tensor, target: Tensor, visible: Tensor, scale: Tensor, indices: Tensor | None,
    cu_seqlens: Tensor | None, tokens: int, loss: str, prefix_visible: bool, with_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, and the prediction's gradient."""
    gradient = prediction.new_empty(prediction.shape if with_gradient else (0,))
    total = prediction.new_empty((), dtype=torch.float32)
    if is_fake(total):
        return total, gradient
    if prediction.numel() == 0:
        return total.fill_(float("nan")), gradient  # the mean of nothing, as in eager PyTorch
    width, rows = prediction.shape[-1], prediction.numel() // prediction.shape[-1]
    patches = visible.shape[2]
    prefix = tokens - patches if tokens >= patches else tokens  # with prefix_only all are prefix tokens
    gather, strides = indices is not None and target.dim() == 3, (0, 0, 0)
    if indices is None:
        target = with_unit_stride(target).expand(prediction.shape)
        strides = target.stride()[:3]
    else:
        indices, cu_seqlens, target = indices.contiguous(), cu_seqlens[-1:], target.contiguous()
    tile = _tile(loss, width)
    programs = triton.cdiv(rows, tile["BLOCK_R"])
    partial = prediction.new_empty(programs, dtype=torch.float32)
    _forward_kernel[(programs,)](
        prediction.contiguous(), target, visible.contiguous(), scale, indices, cu_seqlens,
        gradient if with_gradient else None, partial, *strides, rows, tokens, prefix, patches, visible.shape[1],
        width, LOSS=loss, PREFIX_COUNTS=not (loss == "masked_mse" and prefix_visible), GATHER=gather, **tile,
    )  # fmt: skip
    return total.copy_(partial.sum(dtype=torch.float64)), gradient


@register("scale_gradient_", mutates=("gradient",))
def scale_op(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, in place."""
    if not is_fake(gradient) and gradient.numel():
        grid = (min(1024, triton.cdiv(gradient.numel(), 2048)),)  # a few for each processor of a GPU
        _scale_kernel[grid](gradient, factor, gradient.numel(), BLOCK=2048, num_warps=8)


class _ReconstructionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prediction, *arguments):
        loss, gradient = forward_op(prediction, *arguments)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, factor):
        (gradient,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return (gradient.float() * factor).to(gradient.dtype), *[None] * 9
        # In place: a second backward through the same graph finds the tensor changed, and autograd says so.
        scale_op(gradient, factor)
        torch.autograd.graph.increment_version(gradient)
        return gradient, *[None] * 9


def reconstruction_loss(
    prediction, target, visible, *, loss="mse", scale=1.0, prefix_visible=False, packing=None
):
    """As `fastalign.ops.reconstruction_loss`, for fp32 and bf16 on a GPU, without argument checks.

    Target and scale get no gradient; backward can run only once.
    """
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, device=prediction.device)
    scale = scale.to(prediction.device, torch.float32)
    indices, slots, cu_seqlens, _ = packing or (None, None, None, None)
    tokens = prediction.shape[2] if slots is None else slots.shape[2]
    with_gradient = torch.is_grad_enabled() and prediction.requires_grad
    return _ReconstructionLoss.apply(
        prediction, target, visible, scale, indices, cu_seqlens, tokens, loss, prefix_visible, with_gradient
    )
