"""Backbones by timm's names: timm's architectures and weights in, timm's state-dict keys in and out.

timm builds the model for the grid of patches that its weights were trained on, and its own `set_input_size` resamples
the positions to the grid that was asked for. `describe.from_timm` then makes our `ViT` of it.
"""

import difflib
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from fastalign.backbones import hub
from fastalign.backbones.checkpoint import Checkpoint, check_config, interpret, read_checkpoint
from fastalign.backbones.describe import MODELS, describe, drop_path_rate, from_timm, pair
from fastalign.backbones.spec import ViTSpec, split_svit
from fastalign.backbones.stored import facts_of, read_facts
from fastalign.backbones.vit import ViT
from fastalign.backbones.weight_files import locate
from fastalign.backbones.weights import load_weights, table_grid, timm_state
from fastalign.utils.errors import UserError, first_line
from fastalign.utils.paths import user_path

MOCO = "vit_base_patch16_mocov3_224"
"""Not in timm: a ViT-B/16 with a fixed sin-cos position embedding (Chen et al., 2021)."""
MOCO_URL = "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"
_MOCO_DATA = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}
_OTHERS = "or give a file or random weights: student.weights=FILE or random (in Python checkpoint=FILE)"
"""What to do without published weights."""
_MODULES = ("vision_transformer", "deit", "beit", "eva")
"""timm's files of the architectures that fastalign supports."""


def create_backbone(
    name: str, pretrained: bool = False, *, checkpoint: str | Path | None = None, **kwargs
) -> ViT:
    """A backbone by its timm name.

    Args:
        name: timm's name, with or without the tag of the weights, or `MOCO`'s; the authors' `svit_X` is `vit_X`
            with attention logits capped at 30 (`max_attn_val`).
        pretrained: load the published weights (through timm; needs the network or timm's cache).
        checkpoint: load these weights instead: a file or a folder, in a layout that docs/backbones.md names. Never
            unpickles code.
        **kwargs: timm's keyword arguments: `img_size`, `depth`, `num_classes` (default 0), `drop_path_rate`...
            Position tables of another `img_size` are resampled.

    Returns:
        A `ViT` with `data`, the normalisation and evaluation constants of the backbone, and `recipe`,
        the name and arguments that make it again.

    Raises:
        UserError: unknown name (with the nearest ones), unreachable or unfitting weights, or an
            architecture that fastalign does not support, which is said before any weights are read.
    """
    name, kwargs, softcap = split_svit(name, {"num_classes": 0, **kwargs})
    template = _template(name, kwargs)
    if checkpoint is not None:
        found, facts = read_checkpoint(checkpoint), facts_of(locate(checkpoint))
        found = found if facts is None else _as_told(found, facts, str(checkpoint))
        return _from_weights(name, kwargs, template, found, str(checkpoint), softcap)
    if pretrained and _is_moco(name):
        return _from_weights(name, kwargs, template, _download(MOCO_URL), MOCO_URL, softcap)
    native = {key: value for key, value in kwargs.items() if key not in ("img_size", "patch_size")}
    source = _create_timm(name, native if pretrained else kwargs, pretrained)
    return _finish(name, kwargs, describe(template), source, softcap)


def load_backbone(path: str | Path, **kwargs) -> ViT:
    """The backbone that a run saved, soft-cap included, in evaluation mode: `backbone.json`, `backbone.safetensors`.

    Args:
        path: the run's folder, or one of the two files.
        **kwargs: timm's arguments that the weights do not depend on: `drop_path_rate`, or `img_size`, for which
            position tables are resampled from the run's grid.
    """
    path = Path(user_path(path))
    if path.is_dir():
        path = path / "backbone.json"
    elif path.suffix == ".safetensors":
        path = path.with_suffix(".json")
    facts, place = read_facts(path), path.with_suffix(".safetensors")
    name, kwargs = facts["name"], {"num_classes": 0, **facts["kwargs"], **kwargs}
    template = _template(name, kwargs)
    found = _as_told(read_checkpoint(place), facts, str(path))
    return _from_weights(name, kwargs, template, found, str(place), None).eval()


def transform(vit: ViT) -> Callable:
    """timm's evaluation transform for a backbone: a PIL image -> its normalised input, [3, height, width].

    It crops the centre, as runs do, also for the few backbones that timm evaluates on squashed images.
    """
    return timm.data.create_transform(**timm.data.resolve_model_data_config(vit), is_training=False)


def _from_weights(
    name: str, kwargs: dict, template: nn.Module, found: Checkpoint, path: str, softcap: float | None
) -> ViT:
    """A backbone with the weights of a file, whose positions are resampled where the file's grid is another one."""
    attn_pool = any(key.startswith("attn_pool.") for key in found.state)
    if found.student and describe(template).pool == "map" and not attn_pool:
        kwargs = {**kwargs, "global_pool": ""}  # a student has no pooling
        template = _template(name, kwargs)
    state, spec = timm_state(found, template, path), describe(template)
    check_config(spec, found.config, path)
    if _is_moco(name):  # whatever the file says, its table is computed
        state["pos_embed"] = torch.zeros(template.pos_embed.shape)
        grid = spec.grid
    else:
        grid = found.grid or table_grid(state, spec, path)
    stored = {}
    if grid != spec.grid:
        stored["img_size"] = (grid[0] * spec.patch_size[0], grid[1] * spec.patch_size[1])
    source = _create_timm(name, {**kwargs, **stored})
    load_weights(source, state, found, path)
    vit = _finish(name, kwargs, spec, source, found.softcap or softcap)
    for norm in (vit.norm, vit.fc_norm):
        if isinstance(norm, nn.LayerNorm):  # fresh in a student: another epsilon than the backbone's
            norm.eps = found.norm_eps or norm.eps
    return vit


def _finish(name: str, kwargs: dict, spec: ViTSpec, source: nn.Module, softcap: float | None) -> ViT:
    """Our backbone of a timm model with its weights, which is brought to the sizes of `spec`."""
    embed = source.patch_embed
    if (pair(embed.img_size), pair(embed.patch_size)) != (spec.image_size, spec.patch_size):
        source.set_input_size(img_size=spec.image_size, patch_size=spec.patch_size)
    changes = {}
    if _is_moco(name):
        changes = {"position_fixed": True, "fresh_norm_eps": 1e-5}  # of torch's norm class
        with torch.no_grad():
            source.pos_embed.copy_(sincos_position(spec.grid, spec.block.width, spec.prefix))
    vit = from_timm(source, {"name": name, "kwargs": kwargs}, **changes)
    vit.softcap = softcap
    return vit


def _as_told(found: Checkpoint, facts: dict, path: str) -> Checkpoint:
    """A checkpoint with what is written beside its weights, at `path`."""
    try:
        grid = describe(_template(facts["name"], facts["kwargs"])).grid
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return found._replace(
        softcap=facts["softcap"],
        norm_eps=facts.get("norm_eps"),
        student=found.student or facts["kwargs"].get("global_pool") == "",
        grid=grid,
    )


def _download(url: str) -> Checkpoint:
    try:
        content = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"cannot load {url} ({first_line(error)}): check the network, {_OTHERS}") from error
    return interpret(content, url)


def _is_moco(name: str) -> bool:
    return name.split(".")[0] == MOCO


def _template(name: str, kwargs: dict) -> nn.Module:
    """The timm model without memory for its weights, once it is known that `ViT` can be made of it.

    Raises:
        UserError: an unknown name, a wrong argument, or an architecture that fastalign does not support.
    """
    _check_name(name)
    with torch.device("meta"):
        template = _create_timm(name, kwargs)
    try:
        from_timm(template)
    except UserError as error:
        raise UserError(f"backbone {name}: {error}") from error
    _check_arguments(name, template)
    return template


def _check_name(name: str) -> None:
    architecture = name.split(".")[0]
    if architecture == MOCO or timm.is_model(architecture):
        return
    names = [MOCO, *(name for module in _MODULES for name in timm.list_models(module=module))]
    near = sorted((name for name in names if name.startswith(architecture)), key=len)[:4]
    near = near or difflib.get_close_matches(architecture, names, n=4, cutoff=0.5)
    raise UserError(f"unknown backbone {name!r}: the nearest names are {', '.join(near) or 'none'}")


def _check_arguments(name: str, source: nn.Module) -> None:
    """What timm accepts and training does not survive, or hardly anybody means."""
    rate = drop_path_rate(source)
    if not 0 <= rate < 1:
        raise UserError(f"{name}: drop_path_rate must lie in 0..1, 1 excluded, got {rate}")
    # A remainder of the image is ignored where the backbone was made so (384 / 14); asked for, it is a slip.
    native = source.pretrained_cfg.get("input_size", (3, 0, 0))[-2:]
    size, patch = pair(source.patch_embed.img_size), pair(source.patch_embed.patch_size)
    wrong = [(side, step) for side, step in zip(size, patch, strict=True) if side % step]
    if wrong and size != tuple(native):
        side, step = wrong[0]
        below = max(side // step, 1) * step
        raise UserError(
            f"{name}: img_size {side} is not a multiple of the patch size {step}: use {below} or {below + step}"
        )


def _create_timm(name: str, kwargs: dict, pretrained: bool = False) -> nn.Module:
    options = {}
    if _is_moco(name):
        name, options = "vit_base_patch16_224", {"pretrained_cfg_overlay": _MOCO_DATA}
    try:
        with hub.asked_once() if pretrained else nullcontext():
            return timm.create_model(name, pretrained=pretrained, **options, **kwargs)
    except Exception as error:
        if isinstance(error, TypeError) and (wrong := _wrong_argument(kwargs)):
            raise UserError(f"backbone {name}: {wrong}") from error
        if pretrained:
            raise UserError(
                f"cannot load the published weights of {name!r} ({hub.reason(error)}): check the network, {_OTHERS}"
            ) from error
        known = timm.list_pretrained(name.split(".")[0] + ".*")
        if "." in name and name not in known:
            remedy = f"weights known for it: {', '.join(known[:4]) or 'none'}"
        else:
            remedy = f"correct its arguments {kwargs}"
        raise UserError(f"backbone {name}: {first_line(error)}; {remedy}") from error


def _wrong_argument(kwargs: dict) -> str | None:
    """Which argument timm does not know, and the nearest that it does; None where it knows all of them."""
    known = sorted({key for model in MODELS for key in inspect.signature(model).parameters})
    for key in kwargs:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            return f"timm knows no argument {key}" + (f"; did you mean {near[0]}?" if near else ": remove it")
    return None


def sincos_position(grid: tuple[int, int], width: int, prefix: int) -> Tensor:
    """[1, P + N, D]: MoCo-v3's fixed table, zeros for prefix tokens, then sines and cosines of column and row.

    The first two quarters of the channels follow the first index of each patch, as in the published weights.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    # The published table orders patches with the width index outermost.
    across = torch.arange(grid[1], dtype=torch.float32).repeat_interleave(grid[0])[:, None] * frequency
    down = torch.arange(grid[0], dtype=torch.float32).repeat(grid[1])[:, None] * frequency
    table = torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1)
    return torch.cat([torch.zeros(prefix, width), table])[None]
