"""The students: a copy of the backbone with a new head, and for MaskEmbed a decoder after it.

The decoder maps masked student tokens to the teacher's tokens of the masked image.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastalign import ops
from fastalign.backbones.blocks import MLP, Block, make_norm
from fastalign.backbones.spec import BlockSpec, ViTSpec
from fastalign.backbones.vit import ViT
from fastalign.method.teacher import check_masking
from fastalign.ops.attention import Sequences
from fastalign.ops.reference import Packing


def student_encoder(
    vit: ViT, out: int, *, head: str = "linear", softcap: float | None = 30.0, frozen: bool = False
) -> ViT:
    """A trainable copy of the backbone: new norms, no pooling, and a new, zero-initialized head of width `out`.

    With `frozen` it keeps the backbone's norm, has no head and trains nothing.
    """
    encoder = copy.deepcopy(vit)
    encoder.pool, encoder.attn_pool, encoder.head_dist = "none", None, None
    encoder.softcap = softcap
    if frozen:
        encoder.head, encoder.fc_norm = nn.Identity(), nn.Identity()
        return encoder.freeze()
    encoder.freeze(False)
    for name in ("norm", "fc_norm"):
        if not isinstance(getattr(encoder, name), nn.Identity):
            setattr(encoder, name, make_norm(replace(vit.spec.block, norm_eps=vit.spec.fresh_norm_eps)))
    if head == "linear":
        encoder.head = last = nn.Linear(vit.embed_dim, out)
    elif head == "mlp":
        encoder.head = MLP(head_spec(vit.spec.block), out)
        last = encoder.head.fc2
    else:
        raise ValueError(f"student head must be 'linear' or 'mlp', got {head!r}")
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return encoder


def head_spec(block: BlockSpec) -> BlockSpec:
    """The shape of the head "mlp": no gate, no norm, and a hidden width equal to the output of the block's `fc1`."""
    hidden = block.mlp_hidden * (2 if block.mlp == "swiglu_packed" else 1)
    return replace(block, mlp="mlp", mlp_hidden=hidden, mlp_norm=False, proj_bias=True)


def decoder_block_spec(
    student: ViTSpec,
    *,
    width: int,
    heads: int | None = None,
    qk_norm: bool | None = None,
    qkv_bias: bool | None = None,
    init_values: float | None = 1e-6,
) -> BlockSpec:
    """The decoder's block. Activation, norm, type of MLP and arguments that are None are the student's."""
    block = student.block
    heads = heads or block.heads
    if width % heads:
        raise ValueError(f"decoder_width {width} is not a multiple of decoder_heads {heads}")
    return BlockSpec(
        width=width,
        heads=heads,
        # The MLP's first layer has 4 width outputs; packed SwiGLU splits them into gate and value.
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
    """Mask the student's tokens, add a position embedding, run a few blocks and predict the teacher's tokens.

    Args:
        block, layers: the shape and the number of its blocks.
        tokens, prefix, out: T, P and D, the teacher's width.
        prefix_only: predict one vector, from the first prefix token (with P = 0 the mean of all predictions).
    """

    def __init__(
        self, block: BlockSpec, *, tokens: int, prefix: int, out: int, layers: int, prefix_only: bool = False
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
        if packing is None:
            x, sequences = ops.expand_masked(tokens, visible, self.pos_embed).flatten(0, 1), None
        else:
            prefix = self.pos_embed[0, : self.prefix] if self.prefix else None
            x = ops.pack(tokens[:, self.prefix :], packing, prefix, self.pos_embed[0, self.prefix :])
            sequences = Sequences(packing.cu_seqlens, packing.slots.shape[2])
        for block in self.blocks:
            x = block(x, sequences=sequences)
        if self.prefix_only and self.prefix:
            x = x[:, :1]
        x = self.head(self.norm(x))
        if packing is not None:
            return x
        if self.prefix_only and not self.prefix:
            x = x.mean(1, keepdim=True)
        return x.unflatten(0, visible.shape[:2])


class MaskEmbedStudent(nn.Module):
    """`encoder` reads the unmasked image once; `decoder` predicts the teacher's tokens for each mask.

    >>> student = fa.MaskEmbedStudent.from_backbone(fa.create_backbone("vit_tiny_patch16_224", depth=2))
    >>> student.encoder(torch.randn(2, 3, 224, 224)).shape
    torch.Size([2, 197, 192])
    """

    def __init__(self, encoder: ViT, decoder: MaskEmbedDecoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    @classmethod
    def from_backbone(
        cls,
        vit: ViT,
        *,
        softcap: float | None = 30.0,
        target_dim: int | None = None,
        head: str = "linear",
        freeze_encoder: bool = False,
        prefix_only: bool = False,
        decoder_layers: int = 2,
        decoder_width: int | None = None,
        decoder_heads: int | None = None,
        decoder_qk_norm: bool | None = None,
        decoder_qkv_bias: bool | None = None,
        decoder_init_values: float | None = 1e-6,
    ) -> "MaskEmbedStudent":
        """A student that starts as a copy of `vit`.

        Args:
            vit: the backbone; it is copied.
            softcap: cap of the encoder's attention logits, 30 as in the paper; None = plain attention.
            target_dim: the teacher's width; default the backbone's.
            head: "linear" or "mlp", from the backbone's width to the decoder's.
            freeze_encoder: train the decoder only, on the backbone's own tokens.
            prefix_only: predict the teacher's pooled output only.
            decoder_layers, decoder_init_values: number of blocks, initial LayerScale (None = no LayerScale).
            decoder_width: default `target_dim`, or the backbone's width with a frozen encoder.
            decoder_heads, decoder_qk_norm, decoder_qkv_bias: default as in the backbone.
        """
        target_dim = target_dim or vit.embed_dim
        width = decoder_width or (vit.embed_dim if freeze_encoder else target_dim)
        if freeze_encoder and width != vit.embed_dim:
            raise ValueError(
                f"decoder_width must be {vit.embed_dim}, the backbone's, when the encoder is frozen"
            )
        options = {"heads": decoder_heads, "qk_norm": decoder_qk_norm, "qkv_bias": decoder_qkv_bias}
        block = decoder_block_spec(vit.spec, width=width, init_values=decoder_init_values, **options)
        prefix, tokens = vit.spec.prefix, vit.spec.prefix + vit.spec.patches
        shape = {"tokens": tokens, "prefix": prefix, "out": target_dim, "prefix_only": prefix_only}
        decoder = MaskEmbedDecoder(block, layers=decoder_layers, **shape)
        encoder = student_encoder(vit, width, head=head, softcap=softcap, frozen=freeze_encoder)
        return cls(encoder, decoder)

    def forward(self, images: Tensor, visible: Tensor, packing: Packing | None = None) -> Tensor:
        """images [B, C, height, width], visible [B, M, N] bool -> predictions [B, M, T, D]; packed [L, D]."""
        return self.decoder(self.encoder(images), visible, packing)


class MIMStudent(nn.Module):
    """The student of masked image modeling: `encoder` reads the masked image and predicts every token it sees.

    >>> student = fa.MIMStudent.from_backbone(fa.create_backbone("vit_tiny_patch16_224", depth=2))
    >>> student(torch.randn(2, 3, 224, 224), torch.ones(2, 1, 196, dtype=torch.bool)).shape
    torch.Size([2, 1, 197, 192])
    """

    def __init__(self, encoder: ViT, masking: str = "zero"):
        super().__init__()
        check_masking("MIMStudent", masking, encoder.spec)
        self.encoder, self.masking = encoder, masking

    @classmethod
    def from_backbone(
        cls,
        vit: ViT,
        *,
        softcap: float | None = 30.0,
        target_dim: int | None = None,
        head: str = "linear",
        masking: str = "zero",
    ) -> "MIMStudent":
        """Arguments as for `MaskEmbedStudent.from_backbone`; `masking` as for `MaskedTeacher`."""
        return cls(student_encoder(vit, target_dim or vit.embed_dim, head=head, softcap=softcap), masking)

    def forward(self, images: Tensor, visible: Tensor, packing: Packing | None = None) -> Tensor:
        """images [B, C, height, width], visible [B, M, N] bool -> predictions [B, M, T, D]; packed [L, D]."""
        if packing is not None:
            tokens = self.encoder.encode(self.encoder.embed_packed(images, packing), packing)
            return self.encoder.forward_head(tokens)
        tokens = self.encoder.encode(self.encoder.embed_masked(images, visible))
        return self.encoder.forward_head(tokens).unflatten(0, visible.shape[:2])
