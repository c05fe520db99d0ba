"""Small timm models, and batches with the samplers' masks."""

import timm
import torch
from torch import nn

import fastalign.compat.locality_alignment as la
from tests.numerics import randomise

MODELS = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "vit_base_patch16_clip_quickgelu_224": {"img_size": 64, "embed_dim": 48, "num_heads": 3},
    "vit_base_patch16_siglip_224": {"img_size": 64, "embed_dim": 48, "num_heads": 3},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "embed_dim": 48, "num_heads": 3},
    "beit_base_patch16_224": {"img_size": 64, "embed_dim": 48, "num_heads": 3},
    "eva02_base_patch16_clip_224": {"img_size": 64, "embed_dim": 48, "num_heads": 3},
}
ONE = "vit_tiny_patch16_224"


def make(name=ONE, depth=3, dtype=torch.float64, **kwargs) -> nn.Module:
    """A small timm model, every parameter moved."""
    torch.manual_seed(0)
    options = {"num_classes": 0, "depth": depth, **MODELS.get(name.removeprefix("s"), {}), **kwargs}
    model = timm.create_model(name, **options).to(dtype)
    randomise(model)
    return model


def batch(model, images=2, seed=0):
    """Images, their masks as the samplers give them, and the images repeated for each mask."""
    size, patches = model.patch_embed.img_size[0], model.patch_embed.num_patches
    pixels = torch.randn(images, 3, size, size, dtype=torch.float64)
    return pixels, la.UniformMaskSampler(patches)(images, seed=seed).double(), pixels.repeat_interleave(3, 0)


def student(encoder, width=40, prefix_only=False, layers=2, target=None):
    """Put together as the training script does it."""
    block, qkv = encoder.blocks[0], getattr(encoder.blocks[0].attn, "qkv", None)
    heads, patches = block.attn.num_heads, encoder.patch_embed.num_patches
    target = target or encoder.embed_dim
    encoder = la.convert_to_student_model(encoder, output_dim=width)
    decoder = la.MaskEmbedDecoder(
        embed_dim=width,
        num_heads=2 if width % heads else heads,
        num_patch_tokens=patches,
        num_prefix_tokens=encoder.num_prefix_tokens,
        output_size=target,
        num_layers=layers,
        prefix_only=prefix_only,
        qkv_bias=qkv is None or qkv.bias is not None,
        init_values=1e-6,
        norm_layer=type(encoder.norm),
        act_layer=type(block.mlp.act),
        mlp_layer=type(block.mlp),
    )
    return la.MaskEmbedStudent(encoder, decoder).double()
