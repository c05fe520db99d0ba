"""The heads that are trained on frozen tokens, as Covert et al. (2025) define them.

Shapes: B images, N patches, P prefix tokens, T = P + N tokens, D width, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastalign.backbones.blocks import Block
from fastalign.backbones.spec import BlockSpec

HEADS = ("linear", "mlp", "transformer", "latent", "latent-global")
LABELS = ("union", "majority", "global-union", "global-in-patch")
"""global-in-patch: each single patch token is asked for the classes of the whole image, which only a token that mixed
the image can answer."""


class TokenShape(NamedTuple):
    """What a head must know of the backbone."""

    patches: int
    prefix: int
    width: int
    heads: int


class Read(nn.Module):
    """Which tokens a head sees: `patches` [B, N, D], `all` [B, T, D], or `image` [B, 1, D].

    `image` is the mean of the prefix tokens, or of all tokens where the backbone has no prefix.
    """

    def __init__(self, which: str, prefix: int):
        super().__init__()
        self.which, self.prefix = which, prefix

    def forward(self, tokens: Tensor) -> Tensor:
        if self.which == "image":
            return (tokens[:, : self.prefix] if self.prefix else tokens).mean(1, keepdim=True)
        return tokens[:, self.prefix :] if self.which == "patches" else tokens


class TransformerHead(nn.Module):
    """Position embedding, norm, pre-norm blocks with LayerScale 0.01, norm, linear layer.

    Args:
        shape: of the backbone.
        classes: C.
        layers: blocks.
        latent: append N learnt query tokens and answer from them, instead of from the patch tokens; the tokens
            then get no position embedding.
        image: answer once an image, from the prefix tokens (without any: from the mean of all answers).
        tokens: T, how many tokens come in.
    """

    def __init__(
        self,
        shape: TokenShape,
        classes: int,
        *,
        tokens: int,
        layers: int = 2,
        latent: bool = False,
        image: bool = False,
    ):
        super().__init__()
        self.shape, self.latent, self.image = shape, latent, image
        block = BlockSpec(
            width=shape.width,
            heads=shape.heads,
            mlp_hidden=4 * shape.width,
            qkv_bias=False,
            layer_scale=0.01,
            norm_eps=1e-5,
        )
        self.pos_embed = nn.Parameter(0.02 * torch.randn(shape.patches if latent else tokens, shape.width))
        self.norm_pre = nn.LayerNorm(shape.width)
        self.blocks = nn.Sequential(*(Block(block) for _ in range(layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, N, C], or [B, 1, C] for one answer an image."""
        if self.latent:
            tokens = torch.cat([tokens, self.pos_embed.to(tokens.dtype).expand(len(tokens), -1, -1)], 1)
        else:
            tokens = tokens + self.pos_embed
        answers = self.head(self.norm(self.blocks(self.norm_pre(tokens))))
        if self.image:
            return (answers[:, : self.shape.prefix] if self.shape.prefix else answers).mean(1, keepdim=True)
        return answers[:, -self.shape.patches :]


def goes_with(head: str, labels: str) -> bool:
    """Latent queries answer for patches; `global-in-patch` asks each token alone, so no head that mixes them."""
    if labels == "global-union":
        return not head.startswith("latent")
    return labels != "global-in-patch" or head in ("linear", "mlp")


def make_head(
    name: str, labels: str, shape: TokenShape, classes: int, *, hidden: int = 1024, layers: int = 2
) -> nn.Module:
    """A head with fresh weights: tokens [B, T, D] -> logits [B, N, C], or [B, 1, C] for `global-union`.

    Args:
        name: linear; mlp (one hidden layer, GELU); transformer; latent (learnt queries beside all tokens);
            latent-global (learnt queries beside the image's one token: what is local in *that*).
        labels: one of LABELS.
        shape: of the backbone.
        classes: C.
        hidden: width of the MLP.
        layers: blocks of the transformers.

    Raises:
        ValueError: an unknown name, or a head that does not go with the labels.
    """
    for value, known, what in ((name, HEADS, "head"), (labels, LABELS, "labels")):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}: choose from {', '.join(known)}")
    if not goes_with(name, labels):
        raise ValueError(f"head {name} does not go with labels {labels}")
    image = labels == "global-union"
    which = {"latent-global": "image", "latent": "all", "transformer": "all"}.get(
        name, "image" if image else "patches"
    )
    if name == "linear":
        head = nn.Linear(shape.width, classes)
    elif name == "mlp":
        head = nn.Sequential(nn.Linear(shape.width, hidden), nn.GELU(), nn.Linear(hidden, classes))
    else:
        tokens = 1 if which == "image" else shape.prefix + shape.patches
        head = TransformerHead(
            shape, classes, tokens=tokens, layers=layers, latent=name != "transformer", image=image
        )
    return nn.Sequential(Read(which, shape.prefix), head)
