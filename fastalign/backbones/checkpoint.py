"""What files of weights hold, the authors' `.pth.tar` among them: a backbone, and what is told of it."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from fastalign.backbones import layouts
from fastalign.backbones.spec import ViTSpec, check_softcap, split_svit
from fastalign.backbones.weight_files import locate, read_json, read_weights
from fastalign.utils.errors import UserError, first_line

STATES = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where a checkpoint keeps its weights; the first that is there is read: an average before the weights."""
_BACKBONES = (".teacher.backbone.", ".weights.", ".student.", ".base_encoder.", ".encoder.")
"""Which of several backbones is read, by the end of the path to it: DINO's average first, then the trained one."""


class Checkpoint(NamedTuple):
    """What a file of weights holds."""

    state: dict[str, Tensor]
    """the weights, with no prefix before timm's keys"""
    arch: str | None = None
    """the model's name, where the file tells it"""
    softcap: float | None = None
    """of the attention logits that it was trained with, where the file tells it"""
    student: bool = False
    """a student of MaskEmbed or masked image modeling: its head is not a classifier, and it has no pooling"""
    layout: str | None = None
    """of the file; None = none that is known, the keys are as they were"""
    config: Mapping[str, Any] = MappingProxyType({})
    """what transformers' config.json beside the file says of the vision model"""
    grid: tuple[int, int] | None = None
    """the patches along height and width that its position tables are of, where that is known"""
    norm_eps: float | None = None
    """epsilon of the last norm, where it is known not to be the backbone's"""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The weights in a file, or in a folder of transformers, timm or open_clip, and what it tells of their model.

    Raises:
        UserError: no such file, not a weights file, damaged, or one that pickles what is not `HARMLESS`.
    """
    path = locate(path)
    checkpoint = interpret(read_weights(path), str(path))
    config = _vision_config(path.with_name("config.json"))
    # A capped export to transformers says its cap there.
    softcap = check_softcap(config.get("softcap", checkpoint.softcap), f"{path}: ")
    return checkpoint._replace(softcap=softcap, config=config, grid=_grid(config))


def interpret(content: Any, path: str) -> Checkpoint:
    """The weights of the backbone in what a file held, by timm's keys where their layout is known.

    Raises:
        UserError: there are none, or those of several backbones.
    """
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is not a weights file: it holds a {type(content).__name__}; give a state dict"
        )
    if {"student", "optimizer", "step", "config"} <= content.keys():
        raise UserError(f"{path} is a checkpoint of a run, for resuming it: give the run's folder")
    states = {key: _tensors(value) for key, value in {"": content, **content}.items()}
    states = {key: state for key, state in states.items() if state}
    if not states:
        key = next((key for key in STATES if content.get(key) is not None), None)
        if not (content[key] if key else content):
            raise UserError(f"{path} holds no weights: give another file")
        raise UserError(
            f"{path} is not a weights file: {key or 'it'} is no dictionary of tensors by name; give a state dict"
        )
    if (chosen := _choose(states, path)) is None:
        return Checkpoint(states[min(states, key=_state_rank)], *trained_as(content, path))
    key, layout, prefix = chosen
    state = {name[len(prefix) :]: value for name, value in states[key].items() if name.startswith(prefix)}
    try:
        state = layouts.to_timm(state, layout)
    except (KeyError, IndexError, RuntimeError) as error:
        raise UserError(
            f"{path} is not whole: the names are those of {layout.name}, the weights are not "
            f"({type(error).__name__}: {first_line(error)}); copy it again"
        ) from error
    around = {key, *prefix.split(".")}
    student = bool(around & {"student", "encoder"}) or "student_model" in _arguments(content)
    # A tower of transformers without its pooling head.
    student |= layout is layouts.HF_CLIP and not any(name.startswith("attn_pool.") for name in state)
    return Checkpoint(state, *trained_as(content, path), student, layout.name)


def _choose(states: dict[str, dict[str, Tensor]], path: str) -> tuple[str, layouts.Layout, str] | None:
    """The state that holds the backbone, its layout, and the prefix there; None = no layout that is known."""
    found: dict[tuple[int, int], list] = {}
    for key, state in states.items():
        place = ".weights." if key in ("", *STATES) else f".{key}."
        for layout, prefix in layouts.find(state):
            ends = (index for index, end in enumerate(_BACKBONES) if (place + prefix).endswith(end))
            rank = (_state_rank(key), next(ends, len(_BACKBONES)))
            found.setdefault(rank, []).append((key, layout, prefix))
    best = found[min(found)] if found else [None]
    if len(best) > 1:
        places = ", ".join(f"{key}.{prefix}".strip(".") for key, _, prefix in best)
        raise UserError(f"{path} holds several backbones ({places}): save one of them alone")
    return best[0]


def _state_rank(key: str) -> int:
    return STATES.index(key) if key in STATES else len(STATES)


def _tensors(value: Any) -> dict[str, Tensor]:
    """The named tensors of a dictionary, without the names of wrappers; empty = there are none."""
    items = value.items() if isinstance(value, dict) else ()
    return {
        layouts.plain(name): tensor
        for name, tensor in items
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def check_config(spec: ViTSpec, config: Mapping[str, Any], path: str) -> None:
    """Compare with a backbone what transformers' config.json says and no weight shows.

    Raises:
        UserError: the weights were made with something else.
    """
    block = spec.block
    for key, ours, argument in (
        ("num_attention_heads", block.heads, "num_heads"),
        ("hidden_act", layouts.HF_ACTIVATIONS[block.activation], "act_layer"),
    ):
        if (theirs := config.get(key, ours)) != ours:
            timms = {name: timm for timm, name in layouts.HF_ACTIVATIONS.items()}.get(theirs, theirs)
            raise UserError(
                f"{path}: its config.json has {key}={theirs}, the backbone has {ours}: give the name that it was "
                f"made with, or the argument {argument}={timms}"
            )


def misfit(checkpoint: Checkpoint, path: str, problem: str) -> UserError:
    """The error for weights that do not fit a backbone."""
    like = layouts.looks_like(checkpoint.state)
    if like or checkpoint.layout is None:
        return UserError(
            f"{path} has a layout that is not read{f', it looks like {like}' if like else ''} ({problem}): convert "
            f"it to the names of {layouts.READ}"
        )
    arch = f" ({checkpoint.arch})" if checkpoint.arch else ""
    return UserError(
        f"{path} holds the weights of another model{arch}: {problem}; give the name and arguments that it was made "
        "with"
    )


def trained_as(content: dict, path: str) -> tuple[str | None, float | None]:
    """The model's name and the soft-cap that a checkpoint's weights were trained with, as far as it tells.

    Raises:
        UserError: it tells of a cap that is no positive number.
    """
    args = _arguments(content)
    names = (args.get("student_model"), args.get("model"), content.get("arch"))
    arch = next((name for name in names if isinstance(name, str) and name), None)
    if "softcap" in content:
        return arch, check_softcap(content["softcap"], f"{path}: ")
    given = (args.get("model_kwargs"), args.get("student_model_kwargs"))
    kwargs = {key: value for part in given if isinstance(part, dict) for key, value in part.items()}
    try:
        return arch, split_svit(arch or "", kwargs)[2]
    except UserError as error:
        raise UserError(f"{path}: its arguments: {error}") from None


def _arguments(content: dict) -> dict:
    """Of the training script."""
    args = content.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}


def _grid(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The patches along height and width of transformers' position tables; SigLIP 2 tells of no image size."""
    sizes = [config.get(key) for key in ("image_size", "patch_size")]
    sizes = [[size, size] if isinstance(size, int) else size for size in sizes]
    if not all(isinstance(size, list) and len(size) == 2 for size in sizes):
        return None
    return sizes[0][0] // sizes[1][0], sizes[0][1] // sizes[1][1]


def _vision_config(path: Path) -> dict[str, Any]:
    config = read_json(path) if path.is_file() else {}
    config = config if isinstance(config, dict) and "model_type" in config else {}
    vision = config.get("vision_config", config)
    if not isinstance(vision, dict):
        return {}
    kind = vision.get("model_type", f"{config.get('model_type')}_vision_model")
    return layouts.HF_DEFAULTS.get(kind, {}) | vision
