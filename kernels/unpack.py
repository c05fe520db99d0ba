"""unpack: a packed row of tokens back in its places, zeros where a patch is hidden.

    out[b, m, t] = packed[slots[b, m, t]], or 0 where the slot is -1

Shapes: B images, M masks, T tokens, D width, L rows. Bytes moved at s bytes per element: forward
``s (L D + B M T D)``; backward clears the rows and reads the gradient of the visible tokens only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels.common import register, row_tile, row_tiles, tile_of_rows


@triton.jit
def _kernel(
    p_packed,  # [L, D] contiguous; written with REVERSE
    p_slots,  # [R], R = B M T
    p_dense,  # [R, D] contiguous; read with REVERSE
    R,
    D: tl.constexpr, REVERSE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_row, o_d = tile_of_rows(tl.program_id(0).to(tl.int64), D, BLOCK_T, BLOCK_D)
    o_slot = tl.load(p_slots + o_row, mask=o_row < R, other=-1).to(tl.int64)
    m_slot = (o_slot >= 0)[:, None] & (o_d < D)[None, :]
    p_packed_row = p_packed + o_slot[:, None] * D + o_d[None, :]
    p_dense_row = p_dense + o_row[:, None] * D + o_d[None, :]
    if REVERSE:
        tl.store(p_packed_row, tl.load(p_dense_row, mask=m_slot, other=0.0), mask=m_slot)
    else:
        b_row = tl.load(p_packed_row, mask=m_slot, other=0.0)
        tl.store(p_dense_row, b_row, mask=(o_row < R)[:, None] & (o_d < D)[None, :])


def _allocate(packed: Tensor, slots: Tensor) -> Tensor:
    return packed.new_empty((*slots.shape, packed.shape[-1]))


def _forward(dense, packed, slots) -> None:
    if len(packed):
        _launch(packed.contiguous(), slots, dense, False)
    else:
        dense.zero_()


def _allocate_gradient(gradient: Tensor, slots: Tensor, length: int) -> Tensor:
    return gradient.new_zeros((length, gradient.shape[-1]))  # padding rows have no gradient


def _backward(packed, gradient, slots, length) -> None:
    _launch(packed, slots, gradient.contiguous(), True)


def _launch(packed, slots, dense, reverse) -> None:
    rows, width = slots.numel(), packed.shape[-1]
    # A row cannot be read before its slot is known: four rows per thread wait for four slots at once.
    tile = row_tile(width) | {"BLOCK_T": 16}
    if rows * width:
        grid = (row_tiles(rows, width, tile),)
        _kernel[grid](packed, slots.contiguous(), dense, rows, width, REVERSE=reverse, **tile)


forward_op = register("unpack", _allocate, _forward)
backward_op = register("unpack_backward", _allocate_gradient, _backward)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, slots):
        ctx.save_for_backward(slots)
        ctx.length = packed.shape[0]
        return forward_op(packed, slots)

    @staticmethod
    def backward(ctx, gradient):
        return backward_op(gradient, ctx.saved_tensors[0], ctx.length), None


def unpack(packed, packing):
    """As `fastalign.ops.unpack`, for fp32, bf16 and fp16 on a GPU, without argument checks.

    `packing` is (indices, slots, cu_seqlens, counts).
    """
    return _Unpack.apply(packed, packing[1])
