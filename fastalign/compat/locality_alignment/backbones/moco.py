"""MoCo-v3's ViT-B/16 (Chen et al., 2021), which timm lacks: registered as `vit_base_patch16_mocov3_224`."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from timm.layers import PatchEmbed, to_2tuple
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastalign.backbones.zoo import MOCO, MOCO_URL, sincos_position
from fastalign.compat.errors import ArgumentError
from fastalign.utils.errors import UserError


class VisionTransformerMoCo(VisionTransformer):
    """timm's vision transformer with a fixed sin-cos position embedding and MoCo-v3's initialisation.

    Args:
        stop_grad_conv1: the patch embedding is not trained.
        **kwargs: timm's.
    """

    def __init__(self, stop_grad_conv1: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.build_2d_sincos_position_embedding()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                rows = len(module.weight) // 3 if "qkv" in name else len(module.weight)  # q, k and v apart
                _xavier(module, rows + module.in_features)
        nn.init.normal_(self.cls_token, std=1e-6)
        if isinstance(self.patch_embed, PatchEmbed):
            _xavier(self.patch_embed.proj, 3 * math.prod(self.patch_embed.patch_size) + self.embed_dim)
            if stop_grad_conv1:
                self.patch_embed.proj.requires_grad_(False)

    def build_2d_sincos_position_embedding(self, temperature: float = 10000.0) -> None:
        """Make `pos_embed` [1, 1 + N, D] anew, not trained. `temperature` is MoCo-v3's, no other is there."""
        if temperature != 10000.0:
            raise ArgumentError(f"temperature must be 10000, as in MoCo-v3, got {temperature}")
        if self.embed_dim % 4:
            raise ArgumentError(
                f"a sin-cos position embedding needs a width divisible by 4, got {self.embed_dim}"
            )
        table = sincos_position(self.patch_embed.grid_size, self.embed_dim, self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(table, requires_grad=False)


def _xavier(module: nn.Module, fans: int) -> None:
    nn.init.uniform_(module.weight, -math.sqrt(6 / fans), math.sqrt(6 / fans))
    if module.bias is not None:
        nn.init.zeros_(module.bias)


class ConvStem(nn.Module):
    """A convolutional patch embedding for patches of 16 (Xiao et al., 2021): four strided 3x3 layers, then 1x1.

    Args:
        norm_layer: called with the width; None = no norm.
        flatten: [B, N, D] out, else [B, D, h, w].
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable | None = None,
        flatten: bool = True,
    ):
        super().__init__()
        if patch_size != 16 or embed_dim % 8:
            raise ArgumentError(
                f"ConvStem needs patch_size 16 and a width divisible by 8, got {patch_size} and {embed_dim}"
            )
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        self.grid_size = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.num_patches, self.flatten = self.grid_size[0] * self.grid_size[1], flatten
        widths = [in_chans] + [embed_dim * 2**step // 8 for step in range(4)]
        layers = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, height, width] -> [B, N, D]"""
        if tuple(x.shape[2:]) != self.img_size:
            raise ArgumentError(f"images are {list(x.shape[2:])}, the model wants {list(self.img_size)}")
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2) if self.flatten else x)


def _config(name: str) -> dict:
    return {
        "architecture": name,
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


def _download() -> dict[str, Tensor]:
    """The published weights, under timm's keys; the position embedding is a fixed table and is left out."""
    try:
        state = torch.hub.load_state_dict_from_url(MOCO_URL, map_location="cpu", weights_only=True)[
            "state_dict"
        ]
    except Exception as error:
        raise UserError(
            f"cannot load {MOCO_URL} ({error}): check the network, or load weights yourself"
        ) from error
    prefix = "module.base_encoder."
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in state.items() if key != "pos_embed" and not key.startswith("head.")}


@register_model
def vit_base_patch16_mocov3_224(pretrained: bool = False, **kwargs) -> VisionTransformerMoCo:
    """MoCo-v3's ViT-B/16, its head always new. Arguments are timm's."""
    if kwargs.get("pretrained_cfg"):
        raise UserError(f"{MOCO} has one set of weights and no tag, got {kwargs['pretrained_cfg']!r}")
    shape = {
        "patch_size": 16,
        "embed_dim": 768,
        "depth": 12,
        "num_heads": 12,
        "mlp_ratio": 4,
        "qkv_bias": True,
    }
    options = {
        **shape,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        **kwargs,
        "pretrained_cfg": _config(MOCO),
    }
    model = build_model_with_cfg(VisionTransformerMoCo, MOCO, pretrained=False, **options)
    if pretrained:
        missing = model.load_state_dict(_download(), strict=False)
        if wrong := [
            key for key in (*missing[0], *missing[1]) if key != "pos_embed" and not key.startswith("head.")
        ]:
            raise UserError(f"{MOCO}: the published weights do not fit, first at {wrong[0]}")
    return model
