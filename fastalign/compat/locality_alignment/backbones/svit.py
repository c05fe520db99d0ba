"""timm's vision transformers with soft-capped attention, registered as `svit_*`: keys and weights are timm's."""

from functools import partial

import timm
from timm.models import register_model
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from fastalign.compat.errors import ArgumentError
from fastalign.compat.locality_alignment.model_utils import Attention


class StableAttention(Attention):
    """Attention with capped logits."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        max_attn_val: float = 30.0,
        **kwargs,
    ):
        super().__init__(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            max_attn_val=max_attn_val,
            **kwargs,
        )


class StableBlock(Block):
    """timm's block with `StableAttention`. Arguments are timm's, and `max_attn_val`."""

    def __init__(self, dim: int, num_heads: int, *args, max_attn_val: float = 30.0, **kwargs):
        super().__init__(dim, num_heads, *args, **kwargs)
        if type(self.attn) is not TimmAttention:
            raise ArgumentError(f"attention of type {type(self.attn).__name__} cannot be capped")
        self.attn.__class__, self.attn.max_attn_val = StableAttention, max_attn_val


def create_svit(model_name: str, pretrained: bool = False, **kwargs) -> VisionTransformer:
    """A timm vision transformer whose blocks are `StableBlock`.

    Args:
        model_name: timm's.
        pretrained: load the published weights.
        **kwargs: timm's, and `max_attn_val`, the cap (30).
    """
    block = StableBlock
    if "max_attn_val" in kwargs:
        block = partial(StableBlock, max_attn_val=kwargs.pop("max_attn_val"))
    return timm.create_model(model_name, pretrained=pretrained, block_fn=block, **kwargs)


def _register(name: str):
    def build(pretrained: bool = False, **kwargs) -> VisionTransformer:
        return create_svit(name, pretrained, **kwargs)

    build.__name__ = build.__qualname__ = f"s{name}"
    build.__doc__ = f"timm's {name} with soft-capped attention."
    return register_model(build)


svit_tiny_patch16_224 = _register("vit_tiny_patch16_224")
svit_small_patch16_224 = _register("vit_small_patch16_224")
svit_base_patch16_224 = _register("vit_base_patch16_224")
svit_large_patch16_224 = _register("vit_large_patch16_224")
svit_base_patch16_mocov3_224 = _register("vit_base_patch16_mocov3_224")
svit_base_patch16_clip_224 = _register("vit_base_patch16_clip_224")
svit_base_patch16_clip_quickgelu_224 = _register("vit_base_patch16_clip_quickgelu_224")
svit_large_patch14_clip_quickgelu_224 = _register("vit_large_patch14_clip_quickgelu_224")
svit_large_patch14_clip_quickgelu_336 = _register("vit_large_patch14_clip_quickgelu_336")
svit_base_patch14_dinov2 = _register("vit_base_patch14_dinov2")
svit_base_patch14_reg4_dinov2 = _register("vit_base_patch14_reg4_dinov2")
svit_base_patch16_siglip_224 = _register("vit_base_patch16_siglip_224")
svit_so400m_patch14_siglip_224 = _register("vit_so400m_patch14_siglip_224")
svit_so400m_patch14_siglip_384 = _register("vit_so400m_patch14_siglip_384")
