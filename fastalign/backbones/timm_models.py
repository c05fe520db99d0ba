"""timm models: by name, checked before any weights are read; or a user's, with the name that builds it again."""

import copy
import json

import timm
import torch
from timm.models import get_model_args
from torch import nn

from fastalign.backbones.accelerate import accelerated
from fastalign.backbones.describe import describe, from_timm
from fastalign.backbones.spec import ViTSpec
from fastalign.backbones.vit import ViT
from fastalign.utils.errors import UserError, first_line, unknown

_FAMILIES = ("vision_transformer", "deit", "beit", "eva", "naflexvit", "moco")
"""timm's modules with supported architectures, and ours."""


def empty_model(name: str, kwargs: dict) -> nn.Module:
    """The timm model without memory for its weights, checked: `ViT` can be made of it."""
    if not timm.is_model(name.split(".")[0]):
        names = (name for family in _FAMILIES for name in timm.list_models(module=family))
        raise UserError(unknown("backbone", name, names))
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
            near = f"{below} or {below + patch}"
            raise UserError(f"{name}: img_size {side} is no multiple of the patch size {patch}: use {near}")
    return model


def create_timm(name: str, kwargs: dict, pretrained: bool = False) -> nn.Module:
    """timm's model; a UserError names what is wrong with its arguments or the network."""
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:
        if pretrained:
            remedy = (
                "check the network, or set student.weights to a file or random (in Python checkpoint=FILE)"
            )
            problem = f"cannot load the published weights of {name!r} ({first_line(error)})"
            raise UserError(f"{problem}: {remedy}") from error
        remedy = f"correct its tag or its arguments {kwargs}"
        raise UserError(f"backbone {name}: {first_line(error)}; {remedy}") from error


def from_model(model: nn.Module) -> ViT:
    """A copy of a user's timm model on our parts."""
    if accelerated(model):
        raise UserError("the model's attention is replaced: restore timm's with accelerate(model, undo=True)")
    for path, part in model.named_modules():
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            raise UserError(f"{path or 'the model'} has hooks or its own forward: remove them")
    vit = from_timm(model, _recipe_of(model, describe(model)))
    return copy.deepcopy(vit).train(model.training)


def _recipe_of(model: nn.Module, spec: ViTSpec) -> dict | None:
    """The name and arguments that build a model of the same shape, which timm records; None if they are not known."""
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture = config.get("architecture")
    if not architecture or not timm.is_model(architecture):
        return None
    name = f"{architecture}.{config.get('tag')}"
    name = name if name in timm.list_pretrained(f"{architecture}.*") else architecture
    try:
        plain = empty_model(name, {"num_classes": 0})
        usual = get_model_args(plain)
        kwargs = {k: v for k, v in get_model_args(model).items() if k not in usual or v != usual[k]}
        kwargs["num_classes"] = getattr(model.head, "out_features", 0)
        if spec.depth != kwargs.get("depth", len(plain.blocks)):  # the user cut it
            kwargs["depth"] = spec.depth
        recipe = {"name": name, "kwargs": json.loads(json.dumps(kwargs))}
        return recipe if describe(empty_model(**recipe)) == spec else None
    except (UserError, TypeError):  # an argument that is no JSON value
        return None
