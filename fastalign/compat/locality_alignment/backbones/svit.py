"""timm's ViTs with attention logits capped at `max_attn_val` (30), registered as `svit_*`; all else is timm's."""

import timm
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

from fastalign.backbones.spec import split_svit
from fastalign.compat.locality_alignment.model_utils import use_our_attention

NAMES = (  # timm's names of the models below
    *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
    *(f"vit_base_patch16_{kind}_224" for kind in ("mocov3", "clip", "clip_quickgelu", "siglip")),
    *(f"vit_large_patch14_clip_quickgelu_{size}" for size in (224, 336)),
    *(f"vit_base_patch14_{kind}" for kind in ("dinov2", "reg4_dinov2")),
    *(f"vit_so400m_patch14_siglip_{size}" for size in (224, 384)),
)


def _register(name: str) -> None:
    def build(pretrained: bool = False, **kwargs) -> VisionTransformer:
        plain, kwargs, softcap = split_svit(name, kwargs)
        return use_our_attention(timm.create_model(plain, pretrained=pretrained, **kwargs), softcap)

    build.__name__ = build.__qualname__ = name
    globals()[name] = register_model(build)


for _name in NAMES:
    _register(f"s{_name}")
