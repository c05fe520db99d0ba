"""MoCo-v3's ViT-B/16 (Chen et al., 2021), which timm lacks: registered as `vit_base_patch16_mocov3_224`."""

import timm
import torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastalign.backbones.weights import interpret
from fastalign.backbones.zoo import MOCO, MOCO_URL, sincos_position
from fastalign.utils.errors import UserError

_DATA = {
    "crop_pct": 0.875,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
}


@register_model
def vit_base_patch16_mocov3_224(
    pretrained: bool = False,
    *,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    **kwargs,
) -> VisionTransformer:
    """timm's ViT-B/16 with a fixed sin-cos position embedding and a new head. Arguments are timm's."""
    if pretrained_cfg:
        raise UserError(f"{MOCO} has one set of weights and no tag, got {pretrained_cfg!r}")
    model = timm.create_model("vit_base_patch16_224", pretrained_cfg_overlay=_DATA, **kwargs)
    table = sincos_position(model.patch_embed.grid_size, model.embed_dim, model.num_prefix_tokens)
    model.pos_embed = nn.Parameter(table, requires_grad=False)
    if pretrained:
        content = torch.hub.load_state_dict_from_url(MOCO_URL, map_location="cpu", weights_only=True)
        state = interpret(content, MOCO_URL).state
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        own = {
            name: value for name, value in model.state_dict().items() if name.startswith(("head.", "pos_"))
        }
        model.load_state_dict(state | own)
    return model
