"""Rotary position embeddings: queries and keys turned by angles that depend on the place of their patch.

A table is [1 or H, T, d]: the sines of d / 2 angles, then their cosines. Prefix tokens have the angle 0.
Shapes: P prefix tokens, N patches, T = P + N tokens, L packed tokens, H heads, d head width.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastalign.backbones.spec import BlockSpec, ViTSpec
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


def read_position(rope: nn.Module, spec: ViTSpec) -> Tensor:
    """The table of timm's module for the backbone's grid, [1, T, d]; of its mixed rope the coordinates, [2, T]."""
    if spec.rotary_mixed:
        sides = [torch.arange(side, dtype=torch.float32, device=rope.freqs.device) for side in spec.grid]
        coordinates = torch.cartesian_prod(*sides).T
        coordinates = coordinates.flip(0) if rope.grid_indexing == "xy" else coordinates
        return functional.pad(coordinates, (spec.prefix, 0))
    rope = copy.deepcopy(rope).eval()  # without the augmentation of training
    angles = slice(rope.dim // 2) if rope.rotate_half else slice(0, None, 2)  # timm repeats each
    sines, cosines = (part[:, angles] for part in rope.get_embed(spec.grid).chunk(2, 1))
    rows = (0, 0, spec.prefix, 0)
    return torch.cat([functional.pad(sines, rows), functional.pad(cosines, rows, value=1)], 1).unsqueeze(0)


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
