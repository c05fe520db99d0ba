"""MoCo-v3's ViT-B/16, registered with timm as `vit_base_patch16_mocov3_224`."""

from fastalign.backbones.moco import vit_base_patch16_mocov3_224 as vit_base_patch16_mocov3_224
