"""pack: the visible tokens of M masked copies of each image in one row.

    packed[slots[b, m, t]] = prefix[t]                              t < P
    packed[slots[b, m, P + n]] = patches[b, n] + position[n]        visible patches; padding rows are zero

Shapes: B images, M masks, N patches, P prefix tokens, T = P + N, D width, L rows. Bytes moved at s bytes per
element: ``s (B N D + L D)`` forward and backward. A backward program owns a token of an image and sums over its
copies without atomics; sums over images take two stages. So results are reproducible.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels import common
from fastalign.kernels.common import store, tile_of_rows


@triton.jit
def _forward_kernel(
    p_patches,  # [B, N, D], any strides over B and N
    p_prefix,  # [P, D] or None, contiguous
    p_position,  # [N, D] or None, contiguous
    p_slots,  # [B, M, T]
    p_end,  # [1], the first padding row
    p_out,  # [L, D]
    stride_b, stride_n, B, T, P, L,
    M: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T) * tl.cdiv(D, BLOCK_D)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_t, o_d = tile_of_rows(tl.program_id(0) % tiles, D, BLOCK_T, BLOCK_D)
    m_d = (o_d < D)[None, :]
    if i_b == B:  # the programs after the last image clear the padding, which is often empty
        step = tl.cdiv(T, BLOCK_T) * BLOCK_T
        for i_row in range(tl.load(p_end).to(tl.int64), L, step):
            o_row = i_row + o_t
            b_zero = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            store(p_out + o_row[:, None] * D + o_d[None, :], b_zero, (o_row < L)[:, None] & m_d)
        return
    o_n = o_t - P
    m_patch = ((o_n >= 0) & (o_t < T))[:, None] & m_d
    p_row = p_patches + i_b * stride_b + o_n[:, None].to(tl.int64) * stride_n + o_d[None, :]
    b_out = tl.load(p_row, mask=m_patch, other=0.0).to(tl.float32)
    if p_position is not None:
        b_out += tl.load(p_position + o_n[:, None] * D + o_d[None, :], mask=m_patch, other=0.0).to(tl.float32)
    if p_prefix is not None:
        m_prefix = (o_t < P)[:, None] & m_d
        b_out += tl.load(p_prefix + o_t[:, None] * D + o_d[None, :], mask=m_prefix, other=0.0).to(tl.float32)
    for i_m in tl.static_range(M):
        o_slot = tl.load(p_slots + (i_b * M + i_m) * T + o_t, mask=o_t < T, other=-1).to(tl.int64)
        store(p_out + o_slot[:, None] * D + o_d[None, :], b_out, (o_slot >= 0)[:, None] & m_d)


@triton.jit
def _backward_kernel(
    p_gradient,  # [L, D] contiguous
    p_slots,  # [B, M, T]
    p_patches,  # out: [B, N, D]
    p_rows,  # out: [chunks, T, D] fp32, the sum over the copies of each chunk of images
    B, T, P, IMAGES,  # images per chunk
    M: tl.constexpr, D: tl.constexpr, PATCHES: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_chunk = tl.program_id(1).to(tl.int64)
    o_t, o_d = tile_of_rows(tl.program_id(0), D, BLOCK_T, BLOCK_D)
    m_d = (o_d < D)[None, :]
    m_t = (o_t < T)[:, None] & m_d
    m_patch = (o_t >= P)[:, None] & m_t
    b_rows = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i_b in range(i_chunk * IMAGES, tl.minimum(i_chunk * IMAGES + IMAGES, B)):
        b_patches = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for i_m in tl.static_range(M):
            o_slot = tl.load(p_slots + (i_b * M + i_m) * T + o_t, mask=o_t < T, other=-1).to(tl.int64)
            p_row = p_gradient + o_slot[:, None] * D + o_d[None, :]
            b_patches += tl.load(p_row, mask=(o_slot >= 0)[:, None] & m_d, other=0.0).to(tl.float32)
        b_rows += b_patches
        if PATCHES:
            store(p_patches + (i_b * (T - P) + o_t[:, None] - P) * D + o_d[None, :], b_patches, m_patch)
    if ROWS:
        tl.store(p_rows + (i_chunk * T + o_t[:, None]) * D + o_d[None, :], b_rows, mask=m_t)


@common.register("pack")
def forward_op(
    patches: Tensor, slots: Tensor, cu_seqlens: Tensor, length: int, prefix: Tensor | None,
    position: Tensor | None,
) -> Tensor:  # fmt: skip
    """[L, D]"""
    (images, copies, tokens), width = slots.shape, patches.shape[-1]
    out = patches.new_empty((length, width), dtype=common.promoted(patches, prefix, position))
    if common.is_fake(out):
        return out
    if out.numel() == 0 or tokens == 0:
        return out.zero_()
    tiles, tile = common.row_tiles(tokens, width)
    patches = common.with_unit_stride(patches)
    rows = [None if row is None else row.contiguous() for row in (prefix, position)]
    _forward_kernel[(tiles * (images + 1),)](
        patches, *rows, slots.contiguous(), cu_seqlens[-1:], out, patches.stride(0), patches.stride(1),
        images, tokens, tokens - patches.shape[1], length, copies, width, **tile,
    )  # fmt: skip
    return out


@common.register("pack_backward")
def backward_op(
    gradient: Tensor, slots: Tensor, count: int, dtype: torch.dtype, patches: bool, rows: bool
) -> tuple[Tensor, Tensor]:
    """The requested gradients: patches; prefix and position as rows [T, D]."""
    (images, copies, tokens), width = slots.shape, gradient.shape[-1]
    out = (
        gradient.new_empty((images, count, width) if patches else (0,), dtype=dtype),
        gradient.new_empty((tokens, width) if rows else (0,), dtype=torch.float32),
    )
    if common.is_fake(gradient):
        return out
    tiles, tile = common.row_tiles(tokens, width)
    per_chunk, chunks = common.image_chunks(images, tiles)
    sums = gradient.new_empty((chunks, tokens, width) if rows else (0,), dtype=torch.float32)
    if images * tokens * width:
        _backward_kernel[(tiles, chunks)](
            gradient.contiguous(), slots.contiguous(), out[0], sums, images, tokens, tokens - count, per_chunk,
            copies, width, PATCHES=patches, ROWS=rows, **tile,
        )  # fmt: skip
    if rows:
        torch.sum(sums, 0, out=out[1])
    return out


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, patches, slots, cu_seqlens, length, prefix, position):
        ctx.save_for_backward(slots)
        ctx.count = patches.shape[1]
        ctx.dtypes = [None if x is None else x.dtype for x in (patches, prefix, position)]
        return forward_op(patches, slots, cu_seqlens, length, prefix, position)

    @staticmethod
    def backward(ctx, gradient):
        (slots,) = ctx.saved_tensors
        need_patches, _, _, _, need_prefix, need_position = ctx.needs_input_grad
        patches, rows = backward_op(
            gradient, slots, ctx.count, ctx.dtypes[0], need_patches, need_prefix or need_position
        )
        before = slots.shape[2] - ctx.count
        prefix = rows[:before].to(ctx.dtypes[1]) if need_prefix else None
        position = rows[before:].to(ctx.dtypes[2]) if need_position else None
        return patches if need_patches else None, None, None, None, prefix, position


def pack(patches, packing, prefix=None, position=None):
    """As `fastalign.ops.pack`, for fp32, bf16 and fp16 on a GPU, without argument checks."""
    indices, slots, cu_seqlens, _ = packing
    return _Pack.apply(patches, slots, cu_seqlens, len(indices), prefix, position)
