"""expand_masked: the decoder's input, M masked copies of the student's tokens plus the position embedding.

    out[b, m, t] = position[t]                                                   t < P: prefix tokens are zeroed
    out[b, m, P + n] = visible[b, m, n] * tokens[b, P + n] + position[P + n]

It is `mask_tokens` with zeros for hidden patches; shapes and bytes as there.
"""

from fastalign.kernels.mask_tokens import MaskTokens


def expand_masked(tokens, visible, position):
    """As `fastalign.ops.expand_masked`, for fp32, bf16 and fp16 on a GPU, without argument checks."""
    first = tokens.shape[1] - visible.shape[2]
    return MaskTokens.apply(tokens, None, visible, position[0, :first], position[0, first:], first)
