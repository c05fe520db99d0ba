"""What fits which class of transformers and open_clip, and the weights by their names there."""

from typing import Any

import torch
from torch import Tensor

from fastalign.backbones.layouts import HF_ACTIVATIONS, HF_CLIP, HF_DINOV2, OPEN_CLIP, Layout, from_timm
from fastalign.backbones.spec import ViTSpec
from fastalign.backbones.vit import ViT

PLAIN = {
    "channels": 3,
    "position": True,
    "relative_position": False,
    "rotary": False,
    "patch_norm": False,
    "final_norm": True,
    "block.mlp": "mlp",
    "block.mlp_norm": False,
    "block.qkv": "fused",
    "block.qkv_bias": True,
    "block.qk_norm": False,
    "block.attention_norm": False,
    "block.norm": "layer_norm",
}
"""What every tower below takes for granted."""
CLIP = PLAIN | {
    "class_token": True,
    "registers": 0,
    "position_prefix": True,
    "pre_norm": True,
    "patch_bias": False,
    "block.layer_scale": None,
}
SIGLIP = PLAIN | {
    "class_token": False,
    "registers": 0,
    "pre_norm": False,
    "patch_bias": True,
    "block.layer_scale": None,
}
DINOV2 = PLAIN | {"class_token": True, "pre_norm": False, "patch_bias": True}


def misfits(spec: ViTSpec, wanted: dict[str, Any]) -> list[str]:
    """What of a backbone a tower cannot express, as "field is x, wanted y"; empty = it fits."""
    found = []
    for name, value in wanted.items():
        have = getattr(spec.block if name.startswith("block.") else spec, name.removeprefix("block."))
        if have != value:
            found.append(f"{name.removeprefix('block.')} is {have}, wanted {value}")
    if len({*spec.grid}) > 1 or len({*spec.image_size}) > 1 or len({*spec.patch_size}) > 1:
        found.append(f"images of {spec.image_size[0]}x{spec.image_size[1]}, wanted square ones")
    return found


def hf_config(spec: ViTSpec) -> dict[str, Any]:
    """What the configurations of transformers' towers share."""
    return {
        "hidden_size": spec.block.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.block.heads,
        "image_size": spec.image_size[0],
        "patch_size": spec.patch_size[0],
        "num_channels": spec.channels,
        "hidden_act": HF_ACTIVATIONS[spec.block.activation],
        "layer_norm_eps": spec.block.norm_eps,
    }


def _finish(state: dict[str, Tensor], layout: Layout, prefix: str = "") -> dict[str, Tensor]:
    return {
        prefix + key: value.detach().float().contiguous().clone()
        for key, value in from_timm(state, layout).items()
    }


def clip_state(vit: ViT) -> dict[str, Tensor]:
    """For transformers' CLIPVisionModel or its SiglipVisionModel without a pooling head.

    The prefix is the one that files have in all versions of transformers.
    """
    return _finish(vit.state_dict(), HF_CLIP, "vision_model.")


def dinov2_state(vit: ViT) -> dict[str, Tensor]:
    """For transformers' Dinov2Model, or Dinov2WithRegistersModel: the prefix's positions go into its tokens.

    A backbone without LayerScale gets factors of one.
    """
    prefix, patches = vit.prefix_rows(), vit.patch_position()
    ones = torch.ones(vit.embed_dim)
    state = {f"blocks.{i}.ls{number}.gamma": ones for i in range(len(vit.blocks)) for number in (1, 2)}
    state |= {key: value for key, value in vit.state_dict().items() if key != "reg_token"} | {
        "cls_token": prefix[None, :1],
        "pos_embed": torch.cat([torch.zeros_like(patches[:1]), patches])[None],
        "mask_token": torch.zeros(1, vit.embed_dim),
    }
    if vit.spec.registers:
        state["register_tokens"] = prefix[None, 1:]
    return _finish(state, HF_DINOV2)


def open_clip_state(vit: ViT) -> dict[str, Tensor]:
    """For open_clip's VisionTransformer; its projection, which alignment has none of, is the identity."""
    return _finish(vit.state_dict() | {"proj": torch.eye(vit.embed_dim)}, OPEN_CLIP)
