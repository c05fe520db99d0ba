"""expand_masked: the decoder's input, M masked copies of the student's tokens plus the position embedding.

    out[b, m, t] = position[t]                                                   t < P: prefix tokens are zeroed
    out[b, m, P + n] = visible[b, m, n] * tokens[b, P + n] + position[P + n]

It is `mask_tokens` with zeros for hidden patches and prefix tokens, so it runs on the same kernels. Shapes and
bytes as there; the backward sums over M for the tokens and over B M for the position in one read of the
gradient, without a temporary of the output's size.
"""

import torch
from torch import Tensor

from fastalign.kernels.mask_tokens import backward_op, forward_op


class _ExpandMasked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, visible, position):
        ctx.save_for_backward(visible)
        ctx.dtypes = tokens.dtype, position.dtype
        before = tokens.shape[1] - visible.shape[2]
        rows = position[0]
        return forward_op(tokens[:, before:], None, visible, rows[:before], rows[before:])

    @staticmethod
    def backward(ctx, gradient):
        (visible,) = ctx.saved_tensors
        need_tokens, _, need_position = ctx.needs_input_grad
        tokens, rows, _ = backward_op(
            gradient, visible, ctx.dtypes[0], True, need_tokens, need_position, False
        )
        return (
            tokens if need_tokens else None,
            None,
            rows.to(ctx.dtypes[1]).unsqueeze(0) if need_position else None,
        )


def expand_masked(tokens: Tensor, visible: Tensor, position: Tensor) -> Tensor:
    """Decoder input: tokens of visible patches, zeros for hidden patches and prefix tokens, plus position.

    Args:
        tokens: [B, T, D] fp32, bf16 or fp16.
        visible: [B, M, N] bool; the P = T - N prefix tokens are always zeroed.
        position: [1, T, D].

    Returns:
        [B, M, T, D], the promoted dtype of tokens and position.
    """
    return _ExpandMasked.apply(tokens, visible, position)
