"""Eager PyTorch for every operation: any device, any dtype, with autograd. The definition of correct.

Shapes: B images, M masks an image, N patches, P prefix tokens, T = P + N, D width, H heads, d head width,
L rows of a packed row of tokens.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

LOSSES = ("mse", "cosine", "l1", "masked_mse", "unmasked_mse")


class Packing(NamedTuple):
    """Where each token of B M masked copies stands when the hidden patches leave the sequence.

    Copy s = b M + m is its P prefix tokens and then its visible patches, ascending; all copies stand one after
    another in one row of L tokens, the rest of which is padding.
    """

    indices: Tensor
    """[L] int32: row r holds token t of image b, as b T + t; -1 = padding."""
    slots: Tensor
    """[B, M, T] int32: the row of each token; -1 = hidden."""
    cu_seqlens: Tensor
    """[B M + 1] int32: where each copy starts, and the end of the last."""
    counts: Tensor
    """[B M] int32: the length of each copy."""


def mask_tokens(
    patches: Tensor,
    hidden: Tensor,
    visible: Tensor,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """The first block's input for M masked copies of each image, from the embeddings of the whole image.

    Blanking a patch's pixels before the patch embedding gives a constant token, because each patch is
    embedded on its own; so the embedding runs once an image, and a copy costs one select.

    Args:
        patches: [B, N, D], the patch embeddings of the unmasked image.
        hidden: [D], the embedding of a blank patch.
        visible: [B, M, N] bool.
        prefix: [P, D], the prefix tokens, their position already added; None = P is 0.
        position: [N, D], added to every patch, hidden or not.

    Returns:
        [B, M, P + N, D], the promoted dtype of patches, prefix and position.
    """
    tokens = torch.where(visible.unsqueeze(-1), patches.unsqueeze(1), hidden.to(patches.dtype))
    return with_prefix(tokens, prefix, position)


def with_prefix(tokens: Tensor, prefix: Tensor | None, position: Tensor | None) -> Tensor:
    """Add the position to the patches [..., N, D], and put the prefix before them."""
    if position is not None:
        tokens = tokens + position
    if prefix is None:
        return tokens
    return torch.cat([prefix.expand(*tokens.shape[:-2], -1, -1), tokens], dim=-2)


def expand_masked(tokens: Tensor, visible: Tensor, position: Tensor) -> Tensor:
    """Decoder input: tokens of visible patches, zeros for hidden patches and prefix tokens, plus position.

    Args:
        tokens: [B, T, D].
        visible: [B, M, N] bool; the P = T - N prefix tokens are always zeroed.
        position: [1, T, D].

    Returns:
        [B, M, T, D].
    """
    keep = functional.pad(visible, (tokens.shape[1] - visible.shape[2], 0), value=False)
    return tokens.unsqueeze(1) * keep.unsqueeze(-1) + position


def pack_masks(visible: Tensor, prefix: int, length: int) -> Packing:
    """The packing of the visible patches of [B, M, N] bool behind `prefix` tokens each, in `length` rows."""
    images, copies, _ = visible.shape
    keep = functional.pad(visible, (prefix, 0), value=True)
    tokens = keep.shape[2]
    counts = keep.sum(-1).flatten()
    rows = keep.flatten().cumsum(0) - 1
    source = torch.arange(images, device=visible.device)[:, None, None] * tokens
    source = (source + torch.arange(tokens, device=visible.device)).expand(-1, copies, -1).flatten()
    # Hidden tokens, and those beyond the length, go to a spare row that is cut off.
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
        packing: of `pack_masks`.
        prefix: [P, D], the prefix tokens, their position already added; None = P is 0.
        position: [N, D], added to every patch.

    Returns:
        [L, D], the promoted dtype of patches, prefix and position; padding rows are zero.
    """
    # The index -1 finds the row of zeros at the end.
    return functional.pad(with_prefix(patches, prefix, position).flatten(0, 1), (0, 0, 0, 1))[packing.indices]


def unpack(packed: Tensor, packing: Packing) -> Tensor:
    """[L, D] -> [B, M, T, D]: each token back in its place, zeros where a patch is hidden."""
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

    Args:
        q, k, v: [B, H, T, d]; with `cu_seqlens` packed, [L, H, d].
        softcap: None = plain attention.
        bias: [1 or B, 1 or H, T, T], added to the capped logits; dense only.
        cu_seqlens: [sequences + 1] int32, the bounds of the packed sequences; rows after the last give zeros.
        max_seqlen: of the longest sequence; for kernels, not used here.

    Returns:
        The shape and dtype of q.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [
            softcap_attention(*(x[a:b].transpose(0, 1).unsqueeze(0) for x in (q, k, v)), softcap=softcap)[0]
            for a, b in pairwise(bounds)
        ]
        return torch.cat([*(part.transpose(0, 1) for part in parts), torch.zeros_like(q[bounds[-1] :])])
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1).to(v.dtype) @ v


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
        target: [B, M, T, D] or broadcastable to it; with `packing`, [L, D], or [B, T, D] from which each row's
            token is taken.
        visible: [B, M, N] bool, with N <= T: the T - N leading tokens are prefix tokens.
        loss: mse | cosine | l1 | masked_mse (only hidden tokens count) | unmasked_mse (only visible ones);
            the last two divide by all elements, as the reference does.
        scale: the target is multiplied by it.
        prefix_visible: `masked_mse` leaves prefix tokens out. They are hidden from the MaskEmbed decoder, but
            the student of masked image modeling has them.
        packing: tokens are packed: the mean goes over the tokens present.

    Returns:
        Scalar, fp32 (float64 for float64 inputs).
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
