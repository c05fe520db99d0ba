"""Eager PyTorch for every operation: any device, any dtype, with autograd. The definition of correct.

Shapes: B images, M masks an image, N patches, P prefix tokens, T = P + N, D width, H heads, d head width.
"""

import torch
from torch import Tensor
from torch.nn import functional

LOSSES = ("mse", "cosine", "l1", "masked_mse", "unmasked_mse")


def mask_tokens(patches: Tensor, hidden: Tensor, visible: Tensor) -> Tensor:
    """Patch embeddings of M masked copies of each image, from the embeddings of the whole image.

    Blanking a patch's pixels before the patch embedding gives a constant token, because each patch is
    embedded on its own; so the embedding runs once an image, and a copy costs one select.

    Args:
        patches: [B, N, D], the patch embeddings of the unmasked image.
        hidden: [D], the embedding of a blank patch.
        visible: [B, M, N] bool.

    Returns:
        [B, M, N, D], the dtype of `patches`.
    """
    return torch.where(visible.unsqueeze(-1), patches.unsqueeze(1), hidden.to(patches.dtype))


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


def softcap_attention(
    q: Tensor, k: Tensor, v: Tensor, *, softcap: float, bias: Tensor | None = None
) -> Tensor:
    """Attention whose scaled logits s become ``softcap * tanh(s / softcap)``. q, k, v: [B, H, T, d]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
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
) -> Tensor:
    """The reconstruction loss, a mean over all elements (over all tokens for `cosine`).

    Args:
        prediction: [B, M, T, D].
        target: [B, M, T, D] or broadcastable to it.
        visible: [B, M, N] bool, with N <= T: the T - N leading tokens are prefix tokens.
        loss: mse | cosine | l1 | masked_mse (only hidden tokens count) | unmasked_mse (only visible ones);
            the last two divide by all elements, as the reference does.
        scale: the target is multiplied by it.
        prefix_visible: `masked_mse` leaves prefix tokens out. They are hidden from the MaskEmbed decoder, but
            the student of masked image modeling has them.

    Returns:
        Scalar, fp32 (float64 for float64 inputs).
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    prediction, target = prediction.to(dtype), target.to(dtype) * scale
    if loss == "cosine":
        return 1.0 - functional.cosine_similarity(prediction, target, dim=-1).mean()
    difference = prediction - target
    if loss == "l1":
        return difference.abs().mean()
    if loss == "mse":
        return difference.square().mean()
    counted = ~visible if loss == "masked_mse" else visible
    prefix_counts = not prefix_visible if loss == "masked_mse" else True
    prefix = prediction.shape[2] - visible.shape[2]
    if prefix < 0:  # prefix_only: the one predicted token is a prefix token
        counted, prefix = counted[..., :0], prediction.shape[2]
    counted = functional.pad(counted, (prefix, 0), value=prefix_counts)
    return (difference.square() * counted.unsqueeze(-1)).mean()
