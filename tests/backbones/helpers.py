"""Names and sizes of small backbones, timm's models with random weights, attention with a cap by its definition."""

import timm
import torch
from torch import nn

from tests.numerics import randomise

VIT, DINO, REGISTERS = "vit_base_patch16_224", "vit_base_patch14_dinov2", "vit_base_patch14_reg4_dinov2"
CLIP, SIGLIP = "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_siglip_224"
DINOV3 = "vit_base_patch16_dinov3_qkvb"
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
AT_16 = {"patch_size": 16}
HF = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
HF |= {"image_size": 32, "patch_size": 16}
"""SMALL for transformers"""
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
ONE = torch.ones(1)


def random_timm(name: str, scale: float = 0.2, **kwargs) -> nn.Module:
    """timm's model in evaluation mode, without a head, with random weights in every parameter."""
    model = timm.create_model(name, **{"num_classes": 0, **kwargs}).eval()
    randomise(model, scale)
    return model


def capped(cap: float):
    """torch's function with the cap by its definition; a bias or mask is added to capped logits."""

    def function(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
        logits = cap * torch.tanh(logits / cap)
        if attn_mask is not None:
            added = attn_mask.dtype != torch.bool
            logits = logits + attn_mask if added else logits.masked_fill(~attn_mask, -torch.inf)
        return torch.einsum("bhqk,bhkd->bhqd", logits.softmax(-1), v)

    return function
