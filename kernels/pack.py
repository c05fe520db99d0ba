"""pack: the visible tokens of M masked copies of each image in one row.

    packed[slots[b, m, t]] = prefix[t]                              t < P
    packed[slots[b, m, P + n]] = patches[b, n] + position[n]        visible patches; padding rows are zero

Shapes: B images, M masks, N patches, P prefix tokens, T = P + N, D width, L rows. Bytes moved for s bytes an
element: forward ``s (B N D + L D)``, backward the same. A program of the backward owns a token of an image and
adds up its copies, so there are no atomics, and the sums over images are taken in two stages: results repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels.common import (
    image_chunks,
    promoted,
    register,
    row_tile,
    row_tiles,
    store,
    with_unit_stride,
)


@triton.jit
def _forward_kernel(
    p_patches,  # [B, N, D], any strides over B and N
    p_prefix,  # [P, D] or None, contiguous
    p_position,  # [N, D] or None, contiguous
    p_slots,  # [B, M, T]
    p_end,  # [1], the first padding row
    p_out,  # [L, D]
    stride_b,
    stride_n,
    B,
    T,
    P,
    L,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(T, BLOCK_T) * tl.cdiv(D, BLOCK_D)
    i_b, i_tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    i_t = i_tile // tl.cdiv(D, BLOCK_D)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = i_tile % tl.cdiv(D, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    if i_b == B:  # the programs after the last image clear the padding, which is often empty
        step = tl.cdiv(T, BLOCK_T) * BLOCK_T
        for i_row in range(tl.load(p_end).to(tl.int64) + i_t * BLOCK_T, L, step):
            o_row = i_row + tl.arange(0, BLOCK_T)
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
    B,
    T,
    P,
    IMAGES,  # images a chunk
    M: tl.constexpr,
    D: tl.constexpr,
    PATCHES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_chunk = tl.program_id(1).to(tl.int64)
    i_t, i_d = tl.program_id(0) // tl.cdiv(D, BLOCK_D), tl.program_id(0) % tl.cdiv(D, BLOCK_D)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
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


def _forward(
    patches: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    length: int,
    prefix: Tensor | None,
    position: Tensor | None,
) -> Tensor:
    images, copies, tokens = slots.shape
    width, tile = patches.shape[-1], row_tile(patches.shape[-1])
    out = torch.empty((length, width), dtype=promoted(patches, prefix, position), device=patches.device)
    if out.numel() == 0 or tokens == 0:
        return out.zero_()
    patches = with_unit_stride(patches)
    rows = [None if row is None else row.contiguous() for row in (prefix, position)]
    _forward_kernel[(row_tiles(tokens, width, tile) * (images + 1),)](
        patches, *rows, slots.contiguous(), cu_seqlens[-1:], out, patches.stride(0), patches.stride(1),
        images, tokens, tokens - patches.shape[1], length, copies, width, **tile,
    )  # fmt: skip
    return out


def _backward(
    gradient: Tensor, slots: Tensor, count: int, dtype: torch.dtype, patches: bool, rows: bool
) -> tuple[Tensor, Tensor]:
    images, copies, tokens = slots.shape
    width, tile = gradient.shape[-1], row_tile(gradient.shape[-1])
    tiles = row_tiles(tokens, width, tile)
    per_chunk, chunks = image_chunks(images, tiles)
    out = gradient.new_empty((images, count, width) if patches else (0,), dtype=dtype)
    sums = gradient.new_empty((chunks, tokens, width) if rows else (0,), dtype=torch.float32)
    if images * tokens * width:
        _backward_kernel[(tiles, chunks)](
            gradient.contiguous(), slots.contiguous(), out, sums, images, tokens, tokens - count, per_chunk,
            copies, width, PATCHES=patches, ROWS=rows, **tile,
        )  # fmt: skip
    return out, sums.sum(0) if rows else sums


def _forward_fake(patches, slots, cu_seqlens, length, prefix, position):
    return patches.new_empty((length, patches.shape[-1]), dtype=promoted(patches, prefix, position))


def _backward_fake(gradient, slots, count, dtype, patches, rows):
    images, _, tokens = slots.shape
    width = gradient.shape[-1]
    return (
        gradient.new_empty((images, count, width) if patches else (0,), dtype=dtype),
        gradient.new_empty((tokens, width) if rows else (0,), dtype=torch.float32),
    )


forward_op = register(
    "pack",
    "(Tensor patches, Tensor slots, Tensor cu_seqlens, SymInt length, Tensor? prefix, Tensor? position) -> Tensor",
    _forward,
    _forward_fake,
)
backward_op = register(
    "pack_backward",
    "(Tensor gradient, Tensor slots, SymInt count, ScalarType dtype, bool patches, bool rows) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


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
        return (
            patches if need_patches else None,
            None,
            None,
            None,
            rows[:before].to(ctx.dtypes[1]) if need_prefix else None,
            rows[before:].to(ctx.dtypes[2]) if need_position else None,
        )


def pack(
    patches: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    length: int,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """The visible tokens of every masked copy in one row.

    Args:
        patches: [B, N, D] fp32, bf16 or fp16.
        slots: [B, M, P + N] int32, the row of each token, -1 = hidden.
        cu_seqlens: [B M + 1] int32; the rows from its last entry on are padding.
        length: L, rows of the result.
        prefix: [P, D], the prefix tokens, their position already added; None = P is 0.
        position: [N, D], added to every patch.

    Returns:
        [L, D], the promoted dtype of patches, prefix and position; padding rows are zero.
    """
    return _Pack.apply(patches, slots, cu_seqlens, length, prefix, position)
