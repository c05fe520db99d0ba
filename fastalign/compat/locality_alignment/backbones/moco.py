"""MoCo-v3's ViT-B/16 (Chen et al., 2021), which timm lacks: registered as `vit_base_patch16_mocov3_224`."""

import timm
import torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastalign.backbones.timm_models import MOCO_DATA
from fastalign.backbones.weights import interpret
from fastalign.backbones.zoo import MOCO, MOCO_URL, sincos_position
from fastalign.utils.errors import UserError


@register_model
def vit_base_patch16_mocov3_224(pretrained: bool = False, pretrained_cfg=None, **kwargs) -> VisionTransformer:
    """timm's ViT-B/16 with a fixed sin-cos position embedding and a new head. Arguments are timm's."""
    if pretrained_cfg:
        raise UserError(f"{MOCO} has one set of weights and no tag, got {pretrained_cfg!r}")
    model = timm.create_model("vit_base_patch16_224", **kwargs | {"pretrained_cfg_overlay": MOCO_DATA})
    table = sincos_position(model.patch_embed.grid_size, model.embed_dim, model.num_prefix_tokens)
    model.pos_embed = nn.Parameter(table, requires_grad=False)
    if pretrained:
        content = torch.hub.load_state_dict_from_url(MOCO_URL, map_location="cpu", weights_only=True)
        state, own = interpret(content, MOCO_URL).state, model.state_dict()
        fixed = [name for name in own if name.startswith(("head.", "pos_"))]
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        model.load_state_dict(state | {name: own[name] for name in fixed})
    return model
