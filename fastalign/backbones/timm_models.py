"""timm models by name: built, and checked before any weights are read."""

import difflib

import timm
import torch
from torch import nn

from fastalign.backbones.describe import from_timm
from fastalign.utils.errors import UserError, first_line

MOCO = "vit_base_patch16_mocov3_224"
"""Not in timm: a ViT-B/16 with a fixed sin-cos position embedding (Chen et al., 2021)."""
MOCO_DATA = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}
OTHER_WEIGHTS = "or give a file or random weights: student.weights=FILE or random (in Python checkpoint=FILE)"


def is_moco(name: str) -> bool:
    """Whether a name is `MOCO`, with or without a tag."""
    return name.split(".")[0] == MOCO


def empty_model(name: str, kwargs: dict) -> nn.Module:
    """The timm model without memory for its weights, checked: `ViT` can be made of it."""
    architecture = name.split(".")[0]
    if architecture != MOCO and not timm.is_model(architecture):
        modules = ("vision_transformer", "deit", "beit", "eva", "naflexvit")  # with supported architectures
        names = [MOCO, *(name for module in modules for name in timm.list_models(module=module))]
        near = sorted((name for name in names if name.startswith(architecture)), key=len)[:4]
        near = near or difflib.get_close_matches(architecture, names, n=4, cutoff=0.5)
        raise UserError(f"unknown backbone {name!r}: the nearest names are {', '.join(near) or 'none'}")
    with torch.device("meta"):
        model = create_timm(name, kwargs)
    try:
        spec = from_timm(model).spec
    except UserError as error:
        raise UserError(f"backbone {name}: {error}") from error
    # timm ignores a remainder of the image. That is meant for native sizes (384 / 14), not for a size asked for.
    native = tuple(model.pretrained_cfg.get("input_size", (3, 0, 0))[-2:])
    for side, patch in zip(spec.image_size, spec.patch_size, strict=True):
        if side % patch and spec.image_size != native:
            below = max(side // patch, 1) * patch
            raise UserError(
                f"{name}: img_size {side} is not a multiple of the patch size {patch}: "
                f"use {below} or {below + patch}"
            )
    return model


def create_timm(name: str, kwargs: dict, pretrained: bool = False) -> nn.Module:
    """timm's model, `MOCO` included; a UserError names what is wrong with its arguments or the network."""
    options = {}
    if is_moco(name):
        name, options = "vit_base_patch16_224", {"pretrained_cfg_overlay": MOCO_DATA}
    try:
        return timm.create_model(name, pretrained=pretrained, **options, **kwargs)
    except Exception as error:
        if pretrained:
            raise UserError(
                f"cannot load the published weights of {name!r} ({first_line(error)}): check the network, "
                f"{OTHER_WEIGHTS}"
            ) from error
        known = timm.list_pretrained(name.split(".")[0] + ".*")
        if "." in name and name not in known:
            remedy = f"weights known for it: {', '.join(known[:4]) or 'none'}"
        else:
            remedy = f"correct its arguments {kwargs}"
        raise UserError(f"backbone {name}: {first_line(error)}; {remedy}") from error
