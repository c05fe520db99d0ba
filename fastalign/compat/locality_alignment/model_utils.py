"""The parts of teacher and student. n = B M masked copies of B images, N patches, P prefix tokens, T = P + N.

Modules stay timm's, with timm's keys and attributes; they run fastalign's attention and mask operations.
"""

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from fastalign import ops
from fastalign.backbones.accelerate import FAST
from fastalign.utils.errors import UserError


def use_our_attention(model: nn.Module, softcap: float | None = None) -> nn.Module:
    """Let timm's attention modules use `fastalign.ops.attention`. Parameters, keys and objects stay."""
    for module in model.modules():
        if fast := FAST.get(type(module)):
            module.__class__, module.softcap = fast, softcap
    return model


class MaskLayer(nn.Module):
    """Blanks the pixels of hidden patches of square images, and a remainder that no patch reads."""

    def __init__(self, image_width: int, patch_size: int):
        super().__init__()
        self.mask_width, self.upsample_factor = image_width // patch_size, patch_size

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Images [n, C, height, width] times masks [n, N]."""
        pixels = mask.view(len(mask), 1, self.mask_width, self.mask_width).to(x.dtype)
        pixels = functional.interpolate(pixels, scale_factor=self.upsample_factor)
        return x * functional.pad(pixels, (0, x.shape[3] - pixels.shape[3], 0, x.shape[2] - pixels.shape[2]))


def mask_layer(model: nn.Module) -> MaskLayer:
    """The mask layer of a timm model's patches."""
    size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
    if size is None or size[0] != size[1] or patch[0] != patch[1]:
        raise UserError(f"masks need square images and patches of a fixed size, got {size} and {patch}")
    return MaskLayer(size[0], patch[0])


class Scale(nn.Module):
    """Multiplies by a constant, the buffer `scale`."""

    def __init__(self, scale: float):
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class MaskEmbedDecoder(nn.Module):
    """From masked student tokens to the teacher's tokens of the masked image."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_patch_tokens: int,  # N
        num_prefix_tokens: int,  # P
        output_size: int,  # the teacher's width
        num_layers: int,
        prefix_only: bool = False,  # predict one vector, from the first prefix token (P = 0: from the mean)
        qkv_bias: bool = False,  # this and all that follow: of timm's Block
        qk_norm: bool = False,
        init_values: float | None = None,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        mlp_layer: type[nn.Module] = Mlp,
    ):
        super().__init__()
        self.prefix_only, self.num_prefix_tokens = prefix_only, num_prefix_tokens
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, num_patch_tokens + num_prefix_tokens, embed_dim))
        layers = {"norm_layer": norm_layer, "act_layer": act_layer, "mlp_layer": mlp_layer}
        options = {"qkv_bias": qkv_bias, "qk_norm": qk_norm, "init_values": init_values, **layers}
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, **options) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, output_size)
        use_our_attention(self)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Tokens [n, T, embed_dim], or of each image once [B, T, embed_dim], and masks [n, N] of 0 and 1.

        Returns [n, T, output_size], or [n, 1, output_size] with prefix_only.
        """
        if mask.dim() != 2 or len(mask) % len(x):
            raise UserError(
                f"mask must be [n, N], n a multiple of the {len(x)} images: got {list(mask.shape)}"
            )
        if mask.dtype != torch.bool:  # checked without waiting for the device
            torch._assert_async(((mask == 0) | (mask == 1)).all(), "a mask must hold 0 and 1 only")
        visible = mask.bool().view(len(x), -1, mask.shape[1])
        x = ops.expand_masked(x, visible, self.pos_embed).flatten(0, 1)
        x = self.head(self.norm(self.blocks(x)))
        if self.prefix_only:
            x = x[:, :1] if self.num_prefix_tokens else x.mean(1, keepdim=True)
        return x


class MaskEmbedStudent(nn.Module):
    """`encoder` reads each image once, `decoder` predicts for each of its masks. Keys `encoder.*`, `decoder.*`."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's blocks in the backward pass, not the decoder's."""
        self.encoder.set_grad_checkpointing(enable)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Images [B, C, height, width], masks [B M, N], image-major -> predictions [B M, T, D]."""
        tokens = self.encoder(x)
        if not isinstance(self.decoder, MaskEmbedDecoder):
            tokens = tokens.repeat_interleave(len(mask) // len(tokens), 0)
        return self.decoder(tokens, mask)


class TransformerPooling(nn.Module):
    """A head that pools T = `num_tokens` tokens: position embedding, blocks without qkv bias, norm, mean."""

    def __init__(self, embed_dim: int, num_heads: int, num_tokens: int, num_layers: int):
        super().__init__()
        self.pos_embed = nn.Parameter(0.02 * torch.randn(num_tokens, embed_dim))
        blocks = (Block(embed_dim, num_heads, norm_layer=nn.LayerNorm) for _ in range(num_layers))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(embed_dim)
        use_our_attention(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, D]"""
        return self.norm(self.blocks(x + self.pos_embed)).mean(1)
