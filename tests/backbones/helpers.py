"""Names and sizes of small backbones for the tests of weights files."""

import torch

VIT, DINO, REGISTERS = "vit_base_patch16_224", "vit_base_patch14_dinov2", "vit_base_patch14_reg4_dinov2"
CLIP, SIGLIP = "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_siglip_224"
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
AT_16 = {"patch_size": 16}
HF = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 32,
    "patch_size": 16,
}
"""SMALL for transformers"""
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
ONE = torch.ones(1)
