"""Attention: one function over the implementations that a device offers."""

from torch import Tensor
from torch.nn import functional

from fastalign import ops


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """Full (non-causal) multi-head attention with the 1 / sqrt(d) scale.

    Args:
        q, k, v: [B, H, T, d], one dtype.
        softcap: logits s become ``softcap * tanh(s / softcap)`` before the bias and the softmax; None = plain.
        bias: [1 or B, 1 or H, T, T], added to the logits (relative position bias).

    Returns:
        [B, H, T, d].
    """
    if softcap is not None:
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast their norm may have left them in fp32
        return ops.softcap_attention(q, k, v, softcap=softcap, bias=bias)
    if bias is not None:
        bias = bias.to(q.dtype)  # under autocast q is in the lower precision, a parameter is not
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
