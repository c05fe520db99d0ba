"""timm models: by name, checked before any weights are read; or a user's, with the name that builds it again."""

import copy

import timm
import torch
from torch import nn

from fastalign.backbones import naflex
from fastalign.backbones.describe import describe, from_timm
from fastalign.backbones.spec import ViTSpec
from fastalign.backbones.vit import ViT
from fastalign.utils.errors import UserError, first_line, unknown

_FAMILIES = ("vision_transformer", "deit", "beit", "eva", "naflexvit", "moco")
"""timm's modules with supported architectures, and ours."""
_NOT_SETTINGS = {
    *("training", "grad_checkpointing", "num_classes", "init_values", "drop_prob", "scale_by_keep", "p"),
    *("dynamic_img_size", "strict_img_size", "flatten", "output_fmt", "feat_shape", "pos_embed_grid_size"),
}
"""Attributes of timm's modules that may differ between two models of one name and arguments."""


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
            remedy = "check the network, or give a file or random weights: student.weights=FILE or random"
            raise UserError(
                f"cannot load the published weights of {name!r} ({first_line(error)}): {remedy} (in Python "
                "checkpoint=FILE)"
            ) from error
        known = timm.list_pretrained(name.split(".")[0] + ".*")
        remedy = f"correct its arguments {kwargs}"
        if "." in name and name not in known:
            remedy = f"weights known for it: {', '.join(known[:4]) or 'none'}"
        raise UserError(f"backbone {name}: {first_line(error)}; {remedy}") from error


def from_model(model: nn.Module) -> ViT:
    """A copy of a user's timm model on our parts."""
    for inner in ("module", "_orig_mod"):
        if isinstance(getattr(model, inner, None), nn.Module):
            raise UserError(f"the model is wrapped in {type(model).__name__}: give model.{inner}")
    for path, part in model.named_modules():
        if type(part).__module__.startswith("fastalign."):
            name = f"{path or 'the model'} is fastalign's {type(part).__name__}"
            raise UserError(f"{name}: give timm's own model, which accelerate(model, undo=True) restores")
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            raise UserError(f"{path or 'the model'} has hooks or its own forward: remove them")
    vit = from_timm(model, _recipe_of(model, describe(model)))
    return copy.deepcopy(vit).train(model.training)


def _recipe_of(model: nn.Module, spec: ViTSpec) -> dict | None:
    """The name and arguments that build a timm model of the same shape and settings; None if they are not found."""
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture = config.get("architecture")
    if not architecture or not timm.is_model(architecture):
        return None
    name = f"{architecture}.{config.get('tag')}"
    name = name if name in timm.list_pretrained(f"{architecture}.*") else architecture
    try:
        usual = _arguments(describe(empty_model(name, {"num_classes": 0})))
        kwargs = {key: value for key, value in _arguments(spec).items() if value != usual[key]}
        made = empty_model(name, {"num_classes": 0, **kwargs, **naflex.table_arguments(model.state_dict())})
    except UserError:
        return None
    if describe(made) != spec or _settings(made) != _settings(model):
        return None
    return {"name": name, "kwargs": {"num_classes": getattr(model.head, "out_features", 0), **kwargs}}


def _arguments(spec: ViTSpec) -> dict:
    """timm's arguments that a shape shows."""
    block = spec.block
    sizes = {"img_size": spec.image_size, "patch_size": spec.patch_size}
    return {
        **{key: size[0] if size[0] == size[1] else list(size) for key, size in sizes.items()},
        "in_chans": spec.channels,
        "depth": spec.depth,
        "embed_dim": block.width,
        "num_heads": block.heads,
        "mlp_ratio": block.mlp_hidden / block.width,
        "init_values": block.layer_scale,
        "global_pool": "" if spec.pool == "none" else spec.pool,
        "class_token": spec.class_token,
        "reg_tokens": spec.registers,
        "no_embed_class": not spec.position_prefix,
        "qkv_bias": block.qkv_bias,
        "qk_norm": block.qk_norm,
        "act_layer": block.activation,
    }


def _settings(model: nn.Module) -> dict:
    """What decides a timm model's function besides its parameters, by path."""
    return {
        f"{path}.{key}": value
        for path, part in model.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, (bool, int, float, str, tuple)) and path not in ("head", "head_dist")
        if key not in _NOT_SETTINGS and not key.startswith("_")
    }
