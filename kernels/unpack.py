"""unpack: packed tokens back in their places, zeros where a patch is hidden.

    out[b, m, t] = packed[slots[b, m, t]], or 0 where the slot is -1

Shapes: B images, M masks, T tokens, D width, L rows. Bytes moved at s bytes per element: ``s (L D + B M T D)``
forward and backward. The backward is `pack`, of B M images with one copy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels import pack
from fastalign.kernels.common import is_fake, register, row_tiles, tile_of_rows


@triton.jit
def _kernel(
    p_packed,  # [L, D] contiguous
    p_slots,  # [R], R = B M T
    p_out,  # [R, D]
    R,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_row, o_d = tile_of_rows(tl.program_id(0).to(tl.int64), D, BLOCK_T, BLOCK_D)
    o_slot = tl.load(p_slots + o_row, mask=o_row < R, other=-1).to(tl.int64)
    m_d = (o_d < D)[None, :]
    b_row = tl.load(
        p_packed + o_slot[:, None] * D + o_d[None, :], mask=(o_slot >= 0)[:, None] & m_d, other=0.0
    )
    tl.store(p_out + o_row[:, None] * D + o_d[None, :], b_row, mask=(o_row < R)[:, None] & m_d)


@register("unpack")
def forward_op(packed: Tensor, slots: Tensor) -> Tensor:
    """[B, M, T, D]"""
    rows, width = slots.numel(), packed.shape[-1]
    out = packed.new_empty((*slots.shape, width))
    if is_fake(out):
        return out
    if packed.numel() == 0:
        out.zero_()
    elif rows:
        # A row cannot be read before its slot is known: four rows per thread wait for four slots at once.
        tiles, tile = row_tiles(rows, width, 16)
        _kernel[(tiles,)](packed.contiguous(), slots.contiguous(), out, rows, width, **tile)
    return out


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, slots, cu_seqlens):
        ctx.save_for_backward(slots, cu_seqlens)
        ctx.length = len(packed)
        return forward_op(packed, slots)

    @staticmethod
    def backward(ctx, gradient):
        slots, cu_seqlens = ctx.saved_tensors
        slots = slots.flatten(0, 1).unsqueeze(1)
        return pack.forward_op(gradient.flatten(0, 1), slots, cu_seqlens, ctx.length, None, None), None, None


def unpack(packed, packing):
    """As `fastalign.ops.unpack`, for fp32, bf16 and fp16 on a GPU, without argument checks."""
    return _Unpack.apply(packed, packing[1], packing[2])
