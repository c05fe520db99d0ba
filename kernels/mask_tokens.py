"""mask_tokens: the first block's input for M masked copies of an image, from one patch embedding.

    out[b, m, t] = prefix[t]                                                     t < P
    out[b, m, P + n] = (patches[b, n] if visible[b, m, n] else hidden) + position[n]

Shapes: B images, M masks, N patches, P prefix tokens, T = P + N, D width. Bytes moved at s bytes per element:
``s (BND + BMTD) + BMN`` forward and backward. Sums over images take two stages, so results are reproducible.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels import common
from fastalign.kernels.common import narrow, store, tile_of_rows


@triton.jit
def _forward_kernel(
    p_patches,  # [B, N, D], any strides over B and N
    p_hidden,  # [D] or None
    p_prefix,  # [P, D] or None, contiguous
    p_position,  # [N, D] or None, contiguous
    p_visible,  # [B, M, N] contiguous
    p_out,  # [B, M, T, D] contiguous
    stride_b, stride_n, N, P,
    M: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(P + N, BLOCK_T) * tl.cdiv(D, BLOCK_D)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_t, o_d = tile_of_rows(tl.program_id(0) % tiles, D, BLOCK_T, BLOCK_D)
    o_n = o_t - P
    m_d = o_d < D
    m_patch = (o_n >= 0) & (o_n < N)
    m_patch_d = m_patch[:, None] & m_d[None, :]
    p_row = p_patches + i_b * stride_b + o_n[:, None].to(tl.int64) * stride_n + o_d[None, :]
    b_patches = tl.load(p_row, mask=m_patch_d, other=0.0).to(tl.float32)
    b_hidden = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if p_hidden is not None:
        # A hidden patch has the dtype of the patches, as in eager PyTorch.
        b_row = tl.load(p_hidden + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_hidden += narrow(b_row, p_patches.dtype.element_ty).to(tl.float32)[None, :]
    b_add = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if p_position is not None:
        p_row = p_position + o_n[:, None] * D + o_d[None, :]
        b_add += tl.load(p_row, mask=m_patch_d, other=0.0).to(tl.float32)
    if p_prefix is not None:
        m_prefix = (o_t < P)[:, None] & m_d[None, :]
        b_add += tl.load(p_prefix + o_t[:, None] * D + o_d[None, :], mask=m_prefix, other=0.0).to(tl.float32)
    for i_m in tl.static_range(M):
        i_copy = i_b * M + i_m
        b_visible = tl.load(p_visible + i_copy * N + o_n, mask=m_patch, other=0) != 0
        b_token = tl.where(b_visible[:, None], b_patches, b_hidden)
        b_out = tl.where(m_patch[:, None], b_token, 0.0) + b_add
        p_row_out = p_out + (i_copy * (P + N) + o_t[:, None]) * D + o_d[None, :]
        store(p_row_out, b_out, (o_t < P + N)[:, None] & m_d[None, :])


@triton.jit
def _backward_kernel(
    p_gradient,  # [B, M, T, D] contiguous
    p_visible,  # [B, M, N] contiguous
    p_patches,  # out: [B, N, D], or [B, T, D] with zeros for the prefix (WHOLE)
    p_rows,  # out: [chunks, T, D] fp32, the sum over the copies of each chunk of images
    p_hidden,  # out: [chunks, T, D] fp32, the same over hidden patches only
    B, N, P, IMAGES,  # images per chunk
    M: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr, PATCHES: tl.constexpr, ROWS: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_chunk = tl.program_id(1).to(tl.int64)
    o_t, o_d = tile_of_rows(tl.program_id(0), D, BLOCK_T, BLOCK_D)
    o_n = o_t - P
    m_patch = (o_n >= 0) & (o_n < N)
    m_out = (o_t < P + N)[:, None] & (o_d < D)[None, :]
    b_rows = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    b_hidden = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i_b in range(i_chunk * IMAGES, tl.minimum(i_chunk * IMAGES + IMAGES, B)):
        b_patches = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for i_m in tl.static_range(M):
            i_copy = i_b * M + i_m
            b_visible = tl.load(p_visible + i_copy * N + o_n, mask=m_patch, other=0) != 0
            p_row = p_gradient + (i_copy * (P + N) + o_t[:, None]) * D + o_d[None, :]
            b_gradient = tl.load(p_row, mask=m_out, other=0.0).to(tl.float32)
            b_rows += b_gradient
            b_patches += tl.where(b_visible[:, None], b_gradient, 0.0)
            if HIDDEN:
                b_hidden += tl.where((m_patch & ~b_visible)[:, None], b_gradient, 0.0)
        if PATCHES:
            if WHOLE:
                store(p_patches + (i_b * (P + N) + o_t[:, None]) * D + o_d[None, :], b_patches, m_out)
            else:
                m_store = m_patch[:, None] & m_out
                store(p_patches + (i_b * N + o_n[:, None]) * D + o_d[None, :], b_patches, m_store)
    p_sum = (i_chunk * (P + N) + o_t[:, None]) * D + o_d[None, :]
    if ROWS:
        tl.store(p_rows + p_sum, b_rows, mask=m_out)
    if HIDDEN:
        tl.store(p_hidden + p_sum, b_hidden, mask=m_out)


@common.register("mask_tokens")
def forward_op(
    patches: Tensor, hidden: Tensor | None, visible: Tensor, prefix: Tensor | None, position: Tensor | None
) -> Tensor:
    """[B, M, T, D]. Without `hidden` hidden patches are zero."""
    (images, copies, count), width = visible.shape, patches.shape[-1]
    tokens = count + (0 if prefix is None else prefix.shape[0])
    shape = (images, copies, tokens, width)
    out = patches.new_empty(shape, dtype=common.promoted(patches, prefix, position))
    if common.is_fake(out) or out.numel() == 0:
        return out
    tiles, tile = common.row_tiles(tokens, width)
    patches = common.with_unit_stride(patches)
    rows = [None if row is None else row.contiguous() for row in (hidden, prefix, position)]
    _forward_kernel[(tiles * images,)](
        patches, *rows, visible.contiguous(), out, patches.stride(0), patches.stride(1),
        count, tokens - count, copies, width, **tile,
    )  # fmt: skip
    return out


@common.register("mask_tokens_backward")
def backward_op(
    gradient: Tensor, visible: Tensor, dtype: torch.dtype, whole: bool, patches: bool, rows: bool,
    hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The requested gradients: patches, or all tokens (`whole`); prefix and position as rows [T, D]; hidden."""
    (images, copies, tokens, width), count = gradient.shape, visible.shape[2]
    shape = (images, tokens if whole else count, width) if patches else (0,)
    out = (
        gradient.new_empty(shape, dtype=dtype),
        gradient.new_empty((tokens, width) if rows else (0,), dtype=torch.float32),
        gradient.new_empty((width,) if hidden else (0,), dtype=torch.float32),
    )
    if common.is_fake(gradient):
        return out
    tiles, tile = common.row_tiles(tokens, width)
    per_chunk, chunks = common.image_chunks(images, tiles)
    shapes = [(chunks, tokens, width) if wanted else (0,) for wanted in (rows, hidden)]
    sums = [gradient.new_empty(shape, dtype=torch.float32) for shape in shapes]
    if images * tokens * width:  # even with no copies, so that the sums are zero
        _backward_kernel[(tiles, chunks)](
            gradient.contiguous(), visible.contiguous(), out[0], *sums,
            images, count, tokens - count, per_chunk, copies,
            D=width, WHOLE=whole, PATCHES=patches, ROWS=rows, HIDDEN=hidden, **tile,
        )  # fmt: skip
    if rows:
        torch.sum(sums[0], 0, out=out[1])
    if hidden:
        torch.sum(sums[1], (0, 1), out=out[2])
    return out


class MaskTokens(torch.autograd.Function):
    """The patches begin with token `first`; those before it are not read and have gradient zero."""

    @staticmethod
    def forward(ctx, tokens, hidden, visible, prefix, position, first):
        ctx.save_for_backward(visible)
        ctx.dtypes = [None if x is None else x.dtype for x in (tokens, hidden, prefix, position)]
        ctx.whole = first > 0
        return forward_op(tokens[:, first:], hidden, visible, prefix, position)

    @staticmethod
    def backward(ctx, gradient):
        (visible,) = ctx.saved_tensors
        need_patches, need_hidden, _, need_prefix, need_position, _ = ctx.needs_input_grad
        wanted = need_patches, need_prefix or need_position, need_hidden
        patches, rows, hidden = backward_op(gradient, visible, ctx.dtypes[0], ctx.whole, *wanted)
        before = gradient.shape[2] - visible.shape[2]
        return (
            patches if need_patches else None,
            hidden.to(ctx.dtypes[1]) if need_hidden else None,
            None,
            rows[:before].to(ctx.dtypes[2]) if need_prefix else None,
            rows[before:].to(ctx.dtypes[3]) if need_position else None,
            None,
        )


def mask_tokens(patches, hidden, visible, prefix=None, position=None):
    """As `fastalign.ops.mask_tokens`, for fp32, bf16 and fp16 on a GPU, without argument checks."""
    return MaskTokens.apply(patches, hidden, visible, prefix, position, 0)
