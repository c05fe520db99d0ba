"""expand_masked: the decoder's input, M masked copies of the student's tokens plus the position embedding.

    out[b, m, t] = position[t]                                                   t < P: prefix tokens are zeroed
    out[b, m, P + n] = visible[b, m, n] * tokens[b, P + n] + position[P + n]

It runs on the kernels of `mask_tokens`, with zeros for hidden patches and prefix tokens; shapes and bytes as there.
The backward sums over M for the tokens and over B M for the position in one read of the gradient.
"""

import torch

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
        flags = (True, need_tokens, need_position, False)
        tokens, rows, _ = backward_op(gradient, visible, ctx.dtypes[0], *flags)
        position = rows.to(ctx.dtypes[1]).unsqueeze(0) if need_position else None
        return tokens if need_tokens else None, None, position


def expand_masked(tokens, visible, position):
    """As `fastalign.ops.expand_masked`, for fp32, bf16 and fp16 on a GPU, without argument checks."""
    return _ExpandMasked.apply(tokens, visible, position)
