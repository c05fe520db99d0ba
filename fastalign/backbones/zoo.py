"""Backbones by timm's names or from timm models: timm's architectures, weights and state-dict keys.

timm builds the model for the grid of patches that its weights were trained on, and its own `set_input_size` resamples
the positions to the requested grid. `describe.from_timm` then converts it to our `ViT`.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import timm
from timm.models import get_model_args
from torch import nn

from fastalign.backbones import naflex
from fastalign.backbones.accelerate import accelerated
from fastalign.backbones.describe import create_timm, describe, empty_model, from_timm
from fastalign.backbones.moco import MOCO as MOCO
from fastalign.backbones.spec import ViTSpec, split_svit
from fastalign.backbones.vit import ViT
from fastalign.backbones.weight_files import read_facts
from fastalign.backbones.weights import Checkpoint, misfit, read_checkpoint, table_grid, timm_state
from fastalign.utils.errors import UserError
from fastalign.utils.files import user_path


def create_backbone(
    name: str | nn.Module, pretrained: bool = False, *, checkpoint: str | Path | None = None, **kwargs
) -> ViT:
    """A backbone by its timm name, or from a timm model with its weights.

    Args:
        name: timm's name, with or without the tag of the weights, or `MOCO`; the authors' `svit_X` is `vit_X` with
            attention logits capped at 30 (`max_attn_val`). Or a timm model: it is copied with its weights, device,
            dtype and classifier, and no other argument is allowed.
        pretrained: load the published weights (through timm; needs the network or timm's cache).
        checkpoint: load these weights instead: a file or a folder, in a layout that docs/backbones.md names. Code
            in it is never run.
        **kwargs: timm's keyword arguments: `img_size`, `depth`, `num_classes` (default 0), `drop_path_rate`...
            Position tables are resampled to another `img_size`.

    Returns:
        A `ViT`. Its `data` says how images are normalized and cropped; its `recipe` is the name and the arguments.

    Raises:
        UserError: an unknown name, an unsupported architecture (before weights are read), weights that do not fit.
    """
    if isinstance(name, nn.Module):
        if pretrained or checkpoint is not None or kwargs:
            raise UserError("create_backbone(model) takes no other arguments: build the model with them")
        return _from_model(name)
    name, kwargs, softcap = split_svit(name, {"num_classes": 0, **kwargs})
    template = empty_model(name, kwargs)
    if checkpoint is not None:
        vit = _from_checkpoint(name, kwargs, template, read_checkpoint(checkpoint), str(checkpoint))
    else:
        native = {key: value for key, value in kwargs.items() if key not in ("img_size", "patch_size")}
        source = create_timm(name, native if pretrained else kwargs, pretrained)
        vit = _finish(name, kwargs, template, source)
    vit.softcap = vit.softcap or softcap
    return vit


def load_backbone(path: str | Path, **kwargs) -> ViT:
    """The backbone that a run saved, soft-cap included, in evaluation mode.

    Args:
        path: the run's folder, or its `backbone.json` or `backbone.safetensors`.
        **kwargs: timm's arguments that may differ from training: `drop_path_rate`, or `img_size`, to which
            position tables are resampled.
    """
    path = Path(user_path(path))
    if path.suffix not in (".json", ".safetensors") or path.is_dir():
        path = path / "backbone.json"
    facts, weights = read_facts(path.with_suffix(".json")), path.with_suffix(".safetensors")
    name, kwargs = facts["name"], {"num_classes": 0, **facts["kwargs"], **kwargs}
    found = read_checkpoint(weights, facts)
    vit = _from_checkpoint(name, kwargs, empty_model(name, kwargs), found, str(weights))
    # A user's model may have its own preprocessing.
    vit.data = {key: facts.get(key, value) for key, value in vit.data.items()}
    return vit.eval()


def transform(vit: ViT) -> Callable:
    """timm's evaluation transform with a centre crop: a PIL image -> normalized input, [3, height, width]."""
    return timm.data.create_transform(**timm.data.resolve_model_data_config(vit), is_training=False)


def _from_checkpoint(name: str, kwargs: dict, template: nn.Module, found: Checkpoint, path: str) -> ViT:
    """A backbone with the weights of a file, whose positions are resampled from the file's grid."""
    attn_pool = any(key.startswith("attn_pool.") for key in found.state)
    if found.student and describe(template).pool == "map" and not attn_pool:
        kwargs = {**kwargs, "global_pool": ""}  # a student has no pooling
        template = empty_model(name, kwargs)
    state, spec = timm_state(found, template, path), describe(template)
    stored, grid = naflex.table_arguments(state), spec.grid
    if not stored:
        grid = found.grid or table_grid(state, spec, path)
    if grid != spec.grid:
        stored["img_size"] = (grid[0] * spec.patch_size[0], grid[1] * spec.patch_size[1])
    source = create_timm(name, {**kwargs, **stored})
    try:
        source.load_state_dict(state)
    except RuntimeError as error:
        raise misfit(found, path, str(error).splitlines()[-1].strip()) from error
    vit = _finish(name, kwargs, template, source)
    vit.softcap = found.softcap
    for norm in (vit.norm, vit.fc_norm):
        if not isinstance(norm, nn.Identity):  # a student's was re-initialized, with another epsilon
            norm.eps = found.norm_eps or norm.eps
    return vit


def _finish(name: str, kwargs: dict, template: nn.Module, source: nn.Module) -> ViT:
    """Our backbone from a timm model with its weights, resized to the image size of `template`."""
    spec, found, changes = describe(template), describe(source), {}
    if isinstance(source, naflex.NaFlexVit):
        changes = {"image_size": spec.image_size}
        if found.patch_size != spec.patch_size:
            raise UserError("patch_size: a NaFlexVit's weights are not resampled to another: leave it out")
    elif (found.image_size, found.patch_size) != (spec.image_size, spec.patch_size):
        source.set_input_size(img_size=spec.image_size, patch_size=spec.patch_size)
    return from_timm(source, {"name": name, "kwargs": kwargs}, **changes)


def _from_model(model: nn.Module) -> ViT:
    """Our backbone with copies of the weights of a user's timm model."""
    if accelerated(model):
        raise UserError("the model's attention is replaced: restore timm's with accelerate(model, undo=True)")
    spec = describe(model)
    for path, part in model.named_modules():
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            raise UserError(f"{path or 'the model'} has hooks or its own forward: remove them")
    vit = from_timm(model, _recipe_of(model, spec))
    return copy.deepcopy(vit).train(model.training)


def _recipe_of(model: nn.Module, spec: ViTSpec) -> dict | None:
    """The name and arguments, as timm records them, that build a model of the same shape; None if unknown."""
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
    except (UserError, TypeError):  # an argument that JSON cannot represent
        return None
