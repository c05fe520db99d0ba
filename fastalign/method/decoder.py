"""The MaskEmbed decoder: from masked student tokens to the teacher's view of the masked image."""

import torch
from torch import Tensor, nn

from fastalign import ops
from fastalign.backbones.blocks import Block
from fastalign.backbones.spec import BlockSpec, ViTSpec
from fastalign.ops.attention import Sequences
from fastalign.ops.reference import Packing


def decoder_block_spec(
    student: ViTSpec,
    *,
    width: int,
    heads: int | None = None,
    qk_norm: bool | None = None,
    qkv_bias: bool | None = None,
    init_values: float | None = 1e-6,
) -> BlockSpec:
    """The decoder's block. Arguments that are None, activation, norm and kind of MLP are the student's."""
    block = student.block
    heads = heads or block.heads
    if width % heads:
        raise ValueError(f"decoder_width {width} is not a multiple of decoder_heads {heads}")
    return BlockSpec(
        width=width,
        heads=heads,
        # The first layer of the MLP has 4 width outputs. Packed, these are the gate and what it gates.
        mlp_hidden=(2 if block.mlp == "swiglu_packed" else 4) * width,
        mlp=block.mlp,
        activation=block.activation,
        qkv_bias=block.qkv_bias if qkv_bias is None else qkv_bias,
        qk_norm=block.qk_norm if qk_norm is None else qk_norm,
        layer_scale=init_values or None,
        # The norm class is that of the student's final norm: BEiT has none, so its decoder's blocks have none.
        norm=block.norm if student.final_norm else "identity",
        norm_eps=student.fresh_norm_eps,
    )


class MaskEmbedDecoder(nn.Module):
    """Masks the student's tokens, adds a position embedding, runs a few blocks, predicts the teacher's tokens.

    Args:
        block, layers: the shape and the number of its blocks.
        tokens, prefix, out: T, P and D, the teacher's width.
        prefix_only: predict one vector, from the first prefix token (with P = 0 the mean of all predictions).
    """

    def __init__(
        self,
        block: BlockSpec,
        *,
        tokens: int,
        prefix: int,
        out: int,
        layers: int = 2,
        prefix_only: bool = False,
    ):
        super().__init__()
        self.prefix, self.prefix_only = prefix, prefix_only
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, block.width))
        self.blocks = nn.ModuleList(Block(block) for _ in range(layers))
        self.norm = nn.LayerNorm(block.width)
        self.head = nn.Linear(block.width, out)

    def forward(self, tokens: Tensor, visible: Tensor, packing: Packing | None = None) -> Tensor:
        """Predict the teacher's tokens for each mask. Prefix tokens are always masked.

        The student's output [B, T, width] and visible [B, M, N] bool -> [B, M, T, D], or [B, M, 1, D] with
        prefix_only; in mode drop, with a `packing` of the visible tokens, [L, D].
        """
        if packing is not None:
            position = self.pos_embed[0]
            prefix = position[: self.prefix] if self.prefix else None
            x = ops.pack(tokens[:, self.prefix :], packing, prefix, position[self.prefix :])
            sequences = Sequences(packing.cu_seqlens, packing.slots.shape[2])
            for block in self.blocks:
                x = block(x, sequences=sequences)
            return self.head(self.norm(x))
        x = ops.expand_masked(tokens, visible, self.pos_embed).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        if self.prefix_only and self.prefix:
            x = x[:, :1]
        x = self.head(self.norm(x))
        if self.prefix_only and not self.prefix:
            x = x.mean(1, keepdim=True)
        return x.unflatten(0, visible.shape[:2])
