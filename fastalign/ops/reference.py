"""Eager PyTorch for every operation: any device, any dtype, with autograd. It defines the correct result.

Shapes: B images, M masks per image, N patches, P prefix tokens, T = P + N, D width, H heads, d head width,
L rows of packed tokens.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

LOSSES = ("mse", "cosine", "l1", "masked_mse", "unmasked_mse")


class Packing(NamedTuple):
    """The position of each token of B M masked copies when hidden patches leave the sequence.

    Copy s = b M + m holds its P prefix tokens, then its visible patches in ascending order. The copies follow one
    another in L rows; the remaining rows are padding.
    """

    indices: Tensor  # [L] int32: b T + t for the row of token t of image b; -1 = padding
    slots: Tensor  # [B, M, T] int32: the row of each token; -1 = hidden
    cu_seqlens: Tensor  # [B M + 1] int32: the first row of each copy, and the end of the last
    counts: Tensor  # [B M] int32: the length of each copy


def mask_tokens(
    patches: Tensor,
    hidden: Tensor,
    visible: Tensor,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """The first block's input for M masked copies of each image, from the patch embeddings of the whole image.

    Each patch is embedded on its own, so blanking its pixels before the embedding equals selecting a constant token.

    Args:
        patches: [B, N, D], the patch embeddings of the unmasked image.
        hidden: [D], the embedding of a blank patch.
        visible: [B, M, N] bool.
        prefix: [P, D], the prefix tokens with their position; None = P is 0.
        position: [N, D], added to every patch, hidden or not.

    Returns:
        [B, M, P + N, D], the promoted dtype of patches, prefix and position.
    """
    tokens = torch.where(visible.unsqueeze(-1), patches.unsqueeze(1), hidden.to(patches.dtype))
    return with_prefix(tokens, prefix, position)


def with_prefix(tokens: Tensor, prefix: Tensor | None, position: Tensor | None) -> Tensor:
    """Patches [..., N, D] plus their position, after the prefix: [..., P + N, D]."""
    if position is not None:
        tokens = tokens + position
    if prefix is None:
        return tokens
    return torch.cat([prefix.expand(*tokens.shape[:-2], -1, -1), tokens], dim=-2)


def expand_masked(tokens: Tensor, visible: Tensor, position: Tensor) -> Tensor:
    """Decoder input [B, M, T, D]: tokens of visible patches, zeros elsewhere, plus position.

    Args:
        tokens: [B, T, D].
        visible: [B, M, N] bool; the P = T - N prefix tokens are always zeroed.
        position: [1, T, D].
    """
    keep = functional.pad(visible, (tokens.shape[1] - visible.shape[2], 0), value=False)
    return tokens.unsqueeze(1) * keep.unsqueeze(-1) + position


def pack_masks(visible: Tensor, prefix: int, length: int) -> Packing:
    """The packing of masks [B, M, N] bool in `length` rows, with `prefix` tokens before each copy."""
    images, copies, _ = visible.shape
    keep = functional.pad(visible, (prefix, 0), value=True)
    tokens = keep.shape[2]
    counts = keep.sum(-1).flatten()
    rows = keep.flatten().cumsum(0) - 1
    source = torch.arange(images, device=visible.device)[:, None, None] * tokens
    source = (source + torch.arange(tokens, device=visible.device)).expand(-1, copies, -1).flatten()
    # Hidden tokens and those beyond the length go to a spare row, which is cut off.
    fits = keep.flatten() & (rows < length)
    indices = torch.full((length + 1,), -1, dtype=torch.int32, device=visible.device)
    indices.scatter_(0, rows.where(fits, length), source.int())
    return Packing(
        indices[:length],
        rows.where(fits, -1).int().view(images, copies, tokens),
        functional.pad(counts.cumsum(0), (1, 0)).int(),
        counts.int(),
    )


def pack(
    patches: Tensor, packing: Packing, prefix: Tensor | None = None, position: Tensor | None = None
) -> Tensor:
    """The visible tokens of every masked copy in one row.

    Args:
        patches: [B, N, D].
        packing: the result of `pack_masks`.
        prefix: [P, D], the prefix tokens with their position; None = P is 0.
        position: [N, D], added to every patch.

    Returns:
        [L, D], the promoted dtype of patches, prefix and position; padding rows are zero.
    """
    # Index -1 selects the row of zeros at the end.
    return functional.pad(with_prefix(patches, prefix, position).flatten(0, 1), (0, 0, 0, 1))[packing.indices]


def unpack(packed: Tensor, packing: Packing) -> Tensor:
    """Packed tokens [L, D] back in their places, [B, M, T, D], with zeros for hidden patches."""
    return functional.pad(packed, (0, 0, 0, 1))[packing.slots]


def softcap_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softcap: float | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Attention whose scaled logits s become ``softcap * tanh(s / softcap)``.

    >>> q, k, v = torch.randn(3, 2, 12, 197, 64)  # [B, H, T, d] each
    >>> fa.ops.softcap_attention(q, k, v, softcap=30.0).shape
    torch.Size([2, 12, 197, 64])

    Args:
        q, k, v: [B, H, T, d]; with `cu_seqlens` packed, [L, H, d].
        softcap: None = plain attention.
        bias: [1 or B, 1 or H, T, T], added to the capped logits; dense only.
        cu_seqlens: [S + 1] int32, the bounds of the packed sequences; rows after the last give zeros.
        max_seqlen: the length of the longest packed sequence. Only the kernel uses it: rows beyond it are NaN.

    Returns:
        The shape and dtype of q. In 16 bits the kernel uses the GPU's tanh, with a relative error of 2^-11.
    """
    if cu_seqlens is not None:
        return each_sequence(partial(softcap_attention, softcap=softcap), q, k, v, cu_seqlens)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1).to(v.dtype) @ v


def each_sequence(dense: Callable, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Packed attention [L, H, d] by a dense function, one sequence after the other; padding rows are zero."""
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)] + [len(q) - bounds[-1]]
    *parts, padding = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, 2) for x in (q, k, v)), strict=True)
    out = [dense(*part) if part[0].shape[2] else part[0] for part in parts]
    return torch.cat([*out, torch.zeros_like(padding[0])], 2)[0].transpose(0, 1)


def reconstruction_loss(
    prediction: Tensor,
    target: Tensor,
    visible: Tensor,
    *,
    loss: str = "mse",
    scale: Tensor | float = 1.0,
    prefix_visible: bool = False,
    packing: Packing | None = None,
) -> Tensor:
    """The reconstruction loss, a mean over all elements (over all tokens for `cosine`).

    Args:
        prediction: [B, M, T, D]; with `packing`, [L, D].
        target: [B, M, T, D] or broadcastable to it; with `packing`, [L, D], or [B, T, D] to gather from.
        visible: [B, M, N] bool, with N <= T: the T - N leading tokens are prefix tokens.
        loss: mse | cosine | l1 | masked_mse (only hidden tokens count) | unmasked_mse (only visible ones);
            the last two divide by all elements, as the authors do.
        scale: the factor of the target, a scalar.
        prefix_visible: exclude prefix tokens from `masked_mse`. They are hidden from the MaskEmbed decoder, but
            visible to the student of masked image modeling.
        packing: of the masks, if tokens are packed; the mean is then over the tokens present.

    Returns:
        Scalar, fp32 (float64 for float64 inputs). The kernel computes the gradient in the forward pass, so backward
        can run only once.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    prediction, target = prediction.to(dtype), target.to(dtype)
    prefix_counts = not prefix_visible if loss == "masked_mse" else True
    if packing is not None:
        tokens, present = packing.slots.shape[-1], packing.indices >= 0
        if target.dim() == 3:
            target = target.flatten(0, 1)[packing.indices.clamp_min(0).long()]
        is_prefix = packing.indices % tokens < tokens - visible.shape[-1]
        counted = is_prefix & prefix_counts if loss == "masked_mse" else torch.ones_like(present)
        prediction, target, counted = prediction[present], target[present], counted[present]
    else:
        counted = ~visible if loss == "masked_mse" else visible
        prefix = prediction.shape[2] - visible.shape[2]
        if prefix < 0:  # prefix_only: the one predicted token is a prefix token
            counted, prefix = counted[..., :0], prediction.shape[2]
        counted = functional.pad(counted, (prefix, 0), value=prefix_counts)
    target = target * scale
    if loss == "cosine":
        return 1.0 - functional.cosine_similarity(prediction, target, dim=-1).mean()
    difference = prediction - target
    if loss == "l1":
        return difference.abs().mean()
    if loss == "mse":
        return difference.square().mean()
    return (difference.square() * counted.unsqueeze(-1)).mean()
