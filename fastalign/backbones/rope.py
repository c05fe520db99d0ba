"""Rotary position embeddings: queries and keys turned by angles that depend on the place of their patch.

A table is [1 or H, T, d]: the sines of d / 2 angles, then their cosines. Prefix tokens have the angle 0.

Shapes: P prefix tokens, N patches, T = P + N tokens, L packed tokens, H heads, d head width.
"""

import torch
from torch import Tensor, nn

from fastalign.backbones.spec import BlockSpec
from fastalign.ops.reference import Packing


def rotate(x: Tensor, table: Tensor, half: bool = False) -> Tensor:
    """Turn pairs of channels: (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
        x: [B, H, T, d], or packed, [L, H, d].
        table: as above, or packed, [L, 1 or H, d].
        half: the pairs are channels i and i + d / 2, else neighbours.
    """
    sine, cosine = table.chunk(2, -1)
    a, b = x.chunk(2, -1) if half else (x[..., ::2], x[..., 1::2])
    turned = a * cosine - b * sine, b * cosine + a * sine
    turned = torch.cat(turned, -1) if half else torch.stack(turned, -1).flatten(-2)
    return turned.to(x.dtype)


def make_table(sines: Tensor, cosines: Tensor, prefix: int) -> Tensor:
    """The table of all tokens from the sines and cosines of patches, each [N, d / 2]."""
    sines = torch.cat([sines.new_zeros(prefix, sines.shape[1]), sines])
    cosines = torch.cat([cosines.new_ones(prefix, cosines.shape[1]), cosines])
    return torch.cat([sines, cosines], 1).unsqueeze(0)


def pack_table(table: Tensor, packing: Packing) -> Tensor:
    """The rows of packed tokens: [1 or H, T, d] -> [L, 1 or H, d]."""
    return table[:, packing.indices % packing.slots.shape[2]].transpose(0, 1)


class MixedRope(nn.Module):
    """Angles as learned sums of both coordinates, for each block and head (Heo et al., 2024), key `freqs`."""

    def __init__(self, block: BlockSpec, depth: int):
        super().__init__()
        self.freqs = nn.Parameter(torch.zeros(2, depth, block.heads, block.width // block.heads // 2))

    def forward(self, coordinates: Tensor, depth: int) -> Tensor:
        """Coordinates [2, T], zeros for prefix tokens -> the tables of the first `depth` blocks, [depth, H, T, d]."""
        freqs = self.freqs[:, :depth].to(torch.promote_types(self.freqs.dtype, torch.float32))
        # Not a matrix product, which autocast would compute in bf16.
        first, second = (x[:, None] * f[:, :, None] for x, f in zip(coordinates, freqs, strict=True))
        angles = first + second
        return torch.cat([angles.sin(), angles.cos()], -1).to(self.freqs.dtype)
