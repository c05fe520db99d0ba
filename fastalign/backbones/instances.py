"""Backbones from timm models with weights, and the name and arguments that build such a model again."""

import copy

import timm
from torch import nn

from fastalign.backbones import naflex
from fastalign.backbones.describe import describe, from_timm
from fastalign.backbones.spec import ViTSpec
from fastalign.backbones.timm_models import empty_model
from fastalign.backbones.vit import ViT
from fastalign.utils.errors import UserError

_NOT_SETTINGS = {
    *("training", "grad_checkpointing", "num_classes", "init_values", "drop_prob", "scale_by_keep", "p"),
    *("dynamic_img_size", "strict_img_size", "flatten", "output_fmt", "feat_shape"),
}
"""Attributes of timm's modules that may differ between two models of one name and arguments."""


def from_model(model: nn.Module) -> ViT:
    """A copy of a timm model on our parts."""
    if isinstance(model, ViT):
        raise UserError("the model is a fastalign backbone already: use it as it is")
    for inner in ("module", "_orig_mod"):
        if isinstance(getattr(model, inner, None), nn.Module):
            raise UserError(f"the model is wrapped in {type(model).__name__}: give model.{inner}")
    for path, part in model.named_modules():
        if type(part).__module__ == "fastalign.backbones.accelerate":
            raise UserError(
                "the model was changed by fastalign.accelerate: give it before that, or timm's name and its file or "
                "folder as checkpoint="
            )
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            raise UserError(
                f"{path or 'the model'} has hooks or its own forward, which would be lost: remove them"
            )
    vit = copy.deepcopy(from_timm(model)).train(model.training)
    vit.recipe = _recipe_of(model, vit.spec)
    return vit


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
        made = empty_model(name, {"num_classes": 0, **kwargs, **naflex.model_arguments(model)})
    except UserError:
        return None
    if describe(made) != spec or _settings(made) != _settings(model):
        return None
    table = naflex.vit_arguments(spec) if isinstance(model, naflex.NaFlexVit) else {}
    return {
        "name": name,
        "kwargs": {"num_classes": getattr(model.head, "out_features", 0), **kwargs, **table},
    }


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
