"""MoCo-v3's ViT-B/16 (Chen et al., 2021), which timm lacks. Importing this module registers it with timm."""

from functools import partial

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

MOCO = "vit_base_patch16_mocov3_224"
default_cfgs = {
    MOCO: {
        "url": "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar",
        "input_size": (3, 224, 224),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "crop_pct": 0.875,
    }
}


class MoCoViT(VisionTransformer):
    """timm's class with torch's norms and a fixed position embedding, which is computed, not read from a file."""

    def __init__(self, **kwargs):
        super().__init__(**{"norm_layer": partial(nn.LayerNorm, eps=1e-6), **kwargs})
        self._compute_position()

    def _compute_position(self) -> None:
        # As in the published weights: the column comes first, in the channels and in the order of patches.
        order = {"reverse_coord": True, "interleave_sin_cos": True}
        table = build_sincos2d_pos_embed(self.patch_embed.grid_size, self.embed_dim, **order)
        prefix = torch.zeros(self.num_prefix_tokens, self.embed_dim)
        self.pos_embed = nn.Parameter(torch.cat([prefix, table])[None], requires_grad=False)

    def set_input_size(self, *args, **kwargs) -> None:
        super().set_input_size(*args, **kwargs)
        self._compute_position()

    def load_state_dict(self, state_dict: dict[str, Tensor], *args, **kwargs):
        return super().load_state_dict({**state_dict, "pos_embed": self.pos_embed}, *args, **kwargs)


@register_model
def vit_base_patch16_mocov3_224(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """Arguments are timm's; the head is always new."""
    return build_model_with_cfg(MoCoViT, MOCO, pretrained, pretrained_filter_fn=_published, **kwargs)


def _published(content: dict, model: nn.Module) -> dict[str, Tensor]:
    """The encoder of the published checkpoint, by the model's keys, with the model's own head."""
    own, state, prefix = model.state_dict(), content["state_dict"], "module.base_encoder."
    return {key: own[key] if key.startswith("head.") else state[prefix + key] for key in own}
