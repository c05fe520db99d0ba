"""MoCo-v3's ViT-B/16 (Chen et al., 2021), which timm lacks: registered as `vit_base_patch16_mocov3_224`."""

import math
from functools import partial

import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastalign.backbones.weights import interpret
from fastalign.backbones.zoo import MOCO, MOCO_URL, sincos_position
from fastalign.utils.errors import UserError

_CONFIG = {
    "architecture": MOCO,
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "num_classes": 1000,
    "pool_size": None,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}


class VisionTransformerMoCo(VisionTransformer):
    """timm's vision transformer with a fixed sin-cos position embedding and MoCo-v3's initialisation.

    Args:
        stop_grad_conv1: the patch embedding is not trained.
        **kwargs: timm's.
    """

    def __init__(self, stop_grad_conv1: bool = False, **kwargs):
        super().__init__(**kwargs)
        table = sincos_position(self.patch_embed.grid_size, self.embed_dim, self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                rows = (
                    len(module.weight) // 3 if "qkv" in name else len(module.weight)
                )  # q, k and v separately
                _xavier(module, rows + module.in_features)
        nn.init.normal_(self.cls_token, std=1e-6)
        _xavier(self.patch_embed.proj, 3 * math.prod(self.patch_embed.patch_size) + self.embed_dim)
        if stop_grad_conv1:
            self.patch_embed.proj.requires_grad_(False)


def _xavier(module: nn.Module, fans: int) -> None:
    nn.init.uniform_(module.weight, -math.sqrt(6 / fans), math.sqrt(6 / fans))
    if module.bias is not None:
        nn.init.zeros_(module.bias)


@register_model
def vit_base_patch16_mocov3_224(pretrained: bool = False, **kwargs) -> VisionTransformerMoCo:
    """MoCo-v3's ViT-B/16, with a new head. Arguments are timm's."""
    if kwargs.get("pretrained_cfg"):
        raise UserError(f"{MOCO} has one set of weights and no tag, got {kwargs['pretrained_cfg']!r}")
    options = {
        "patch_size": 16,
        "embed_dim": 768,
        "depth": 12,
        "num_heads": 12,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        **kwargs,
        "pretrained_cfg": _CONFIG,
    }
    model = build_model_with_cfg(VisionTransformerMoCo, MOCO, pretrained=False, **options)
    if pretrained:
        content = torch.hub.load_state_dict_from_url(MOCO_URL, map_location="cpu", weights_only=True)
        state = interpret(content, MOCO_URL).state
        kept = {key: value for key, value in state.items() if not key.startswith(("head.", "pos_embed"))}
        missing, unexpected = model.load_state_dict(kept, strict=False)
        if wrong := [key for key in (*missing, *unexpected) if not key.startswith(("head.", "pos_embed"))]:
            raise UserError(f"{MOCO}: the published weights do not fit, first at {wrong[0]}")
    return model
