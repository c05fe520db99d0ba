"""Attention: one function over the implementations that a device offers."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastalign import ops


class Sequences(NamedTuple):
    """Where sequences stand in a packed row of L tokens."""

    bounds: Tensor
    """[S + 1] int32: sequence s is rows bounds[s] to bounds[s + 1]; what follows the last is padding."""
    longest: int
    """No sequence is longer."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sequences: Sequences | None = None,
) -> Tensor:
    """Full (non-causal) multi-head attention with the 1 / sqrt(d) scale.

    Args:
        q, k, v: [B, H, T, d], one dtype; with `sequences` packed, [L, H, d].
        softcap: logits s become ``softcap * tanh(s / softcap)`` before the bias and the softmax; None = plain.
        bias: [1 or B, 1 or H, T, T], added to the logits (relative position bias); dense only.
        sequences: each attends to itself alone.

    Returns:
        The shape of q. Padding rows are finite.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast their norm may have left them in fp32
    if sequences is not None:
        if ops.uses_kernels(q):
            bounds, longest = sequences
            return ops.softcap_attention(q, k, v, softcap=softcap, cu_seqlens=bounds, max_seqlen=longest)
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            return _one_by_one(q, k, v, softcap, sequences)
        return _padded(q, k, v, softcap, sequences)
    if softcap is not None:
        return ops.softcap_attention(q, k, v, softcap=softcap, bias=bias)
    if bias is not None:
        bias = bias.to(q.dtype)  # under autocast q is in the lower precision, a parameter is not
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, sequences: Sequences) -> Tensor:
    """Packed attention on a CPU, where the bounds can be read at no cost."""
    bounds = sequences.bounds.tolist()
    lengths = [end - start for start, end in pairwise(bounds)] + [len(q) - bounds[-1]]
    *parts, padding = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, 2) for x in (q, k, v)), strict=True)
    out = [attention(*part, softcap=softcap) if part[0].shape[2] else part[0] for part in parts]
    return torch.cat([*out, padding[0]], 2)[0].transpose(0, 1)  # padding may hold anything finite


def _padded(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, sequences: Sequences) -> Tensor:
    """Packed attention without a packed kernel: every sequence padded to the longest, in fixed shapes."""
    bounds, longest = sequences
    bounds, column = bounds.long(), torch.arange(longest, device=q.device)
    starts, lengths = bounds[:-1, None], bounds.diff()[:, None]
    place = (starts + column).clamp_max(len(q) - 1)
    # An empty sequence keeps a key, so that its softmax, which nobody reads, is finite.
    seen = (column < lengths.clamp_min(1))[:, None, None, :]
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, float("-inf"))
    dense = attention(*(x[place].transpose(1, 2) for x in (q, k, v)), softcap=softcap, bias=bias)
    row = torch.arange(len(q), device=q.device)
    owner = (torch.searchsorted(bounds, row, right=True) - 1).clamp_max(len(lengths) - 1)
    return dense.transpose(1, 2)[owner, (row - bounds[owner]).clamp_max(longest - 1)]
