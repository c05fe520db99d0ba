"""Output heads, and what each reads of a backbone.

Shapes: B images, T tokens (prefix first), D width, C classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastalign.backbones.blocks import Block
from fastalign.backbones.spec import BlockSpec
from fastalign.backbones.vit import ViT

_HEAD_WIDTH = 64
_BLOCKS = 2
_STD = 0.02
_PART = 65_536


def reads(vit: ViT, head: str) -> str:
    """In words: what of the backbone's output a head reads."""
    if head != "linear":
        return "all tokens"
    return "the class token" if vit.spec.class_token else "the mean of the patches"


def represent(vit: ViT, tokens: Tensor, head: str) -> Tensor:
    """What a head reads.

    Args:
        vit: the backbone.
        tokens: [B, T, D], its output.
        head: "linear" reads the class token, the mean of the patches where there is none; then the backbone's own
            norm after pooling, if it has one. The others read all tokens. A pooling that a published model brings
            (attention, mean with a class token) is not used: alignment drops it, and both sides must be read alike.

    Returns:
        [B, D] or [B, T, D].
    """
    if head != "linear":
        return tokens
    pooled = tokens[:, 0] if vit.spec.class_token else tokens[:, vit.num_prefix_tokens :].mean(1)
    return vit.fc_norm(pooled)


class LinearHead(nn.Module):
    """A linear layer on standardised features, zero at the start."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Take mean and spread of each channel from the training features [n, D].

        The function class stays that of a linear layer; what changes is that one learning rate suits all backbones,
        whose features differ a hundredfold in size.
        """
        parts = features.split(_PART)
        mean = sum(part.sum(0, dtype=torch.float64) for part in parts) / len(features)
        spread = (sum((part - mean).square().sum(0) for part in parts) / len(features)).sqrt()
        # A channel that never changes says nothing; dividing by its rounding noise would.
        floor = 1e-6 * spread.max().clamp(min=1e-12)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(spread > floor, 1 / spread.clamp(min=1e-30), torch.zeros_like(spread)))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]"""
        return self.linear((features - self.mean) * self.scale)


class AttentionHead(nn.Module):
    """One learnt query that attends over all tokens, then a linear layer."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.heads = head_count(width)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(_STD * torch.randn(width))
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)
        _initialise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, C]"""
        keys, values = self.kv(self.norm(tokens)).unflatten(-1, (2, self.heads, -1)).unbind(2)
        query = self.query.to(keys.dtype).view(self.heads, 1, -1).expand(len(tokens), -1, -1, -1)
        pooled = functional.scaled_dot_product_attention(query, keys.transpose(1, 2), values.transpose(1, 2))
        return self.linear(self.norm_out(self.proj(pooled.flatten(1))))


class TransformerHead(nn.Module):
    """Two transformer blocks over a learnt class token and all tokens, then a linear layer on the class token."""

    def __init__(self, width: int, classes: int, tokens: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(_STD * torch.randn(1, 1, width))
        self.position = nn.Parameter(_STD * torch.randn(1, tokens, width))
        spec = BlockSpec(width=width, heads=head_count(width), mlp_hidden=4 * width)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(_BLOCKS))
        self.norm_out = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)
        _initialise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, C]"""
        tokens = self.norm(tokens) + self.position
        tokens = torch.cat([self.query.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.linear(self.norm_out(tokens[:, 0]))


def head_count(width: int) -> int:
    """Attention heads of a new head: 64 wide where that divides the width, else one."""
    return width // _HEAD_WIDTH if width % _HEAD_WIDTH == 0 else 1


def make_head(name: str, vit: ViT, classes: int) -> nn.Module:
    """A fresh head, drawn from torch's generator: [B, D] or [B, T, D] -> [B, C]."""
    width = vit.embed_dim
    if name == "linear":
        return LinearHead(width, classes)
    if name == "attention":
        return AttentionHead(width, classes)
    return TransformerHead(width, classes, vit.spec.prefix + vit.spec.patches)


def _initialise(head: nn.Module) -> None:
    for part in head.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=_STD)
            nn.init.zeros_(part.bias)
