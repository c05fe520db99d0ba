"""Attention: one function for all implementations. `backends` holds them, `choice` selects one and says why."""

import torch
from torch import Tensor

from fastalign.ops.attention.backends import BACKENDS, Case, Sequences
from fastalign.ops.attention.choice import choose

__all__ = ["BACKENDS", "Case", "Sequences", "attention", "choose"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sequences: Sequences | None = None,
    backend: str = "auto",
) -> Tensor:
    """Full (non-causal) multi-head attention with the 1 / sqrt(d) scale.

    Args:
        q, k, v: [B, H, T, d], one dtype; with `sequences` packed, [L, H, d].
        softcap: logits s become ``softcap * tanh(s / softcap)`` before the bias and the softmax; None = plain.
        bias: [1 or B, 1 or H, T, T], added to the logits (relative position bias); dense only.
        sequences: the packed sequences; each attends only to itself.
        backend: a name of `BACKENDS`, used if it supports the case; "auto" = the fastest that does.

    Returns:
        The shape of q. Padding rows are finite.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a norm may have returned fp32
    if bias is not None:
        bias = bias.to(v.dtype)
    length = q.shape[2] if sequences is None else sequences.longest
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    kind = softcap is not None, bias is not None, sequences is not None
    compiled = torch.compiler.is_compiling()
    name = _name(backend, q.device.type, v.dtype, *kind, int(length), int(q.shape[-1]), gradient, compiled)
    return BACKENDS[name].run(q, k, v, softcap, bias, sequences)


def _name(backend: str, *facts) -> str:
    """The choice, a constant of a compiled graph: it depends only on what torch.compile guards anyway."""
    return choose(Case(*facts), backend).backend


# As torch.compiler.assume_constant_result sets it, without importing torch._dynamo.
_name._dynamo_marked_constant = True
