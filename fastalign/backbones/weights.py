"""Find the backbone in a weights file and convert its weights and metadata for a timm model."""

import argparse
import copy
import math
import re
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from fastalign.backbones import layouts, naflex, weight_files
from fastalign.backbones.describe import MODELS, describe, empty_model
from fastalign.backbones.spec import ViTSpec, check_softcap, split_svit
from fastalign.utils.errors import UserError, first_line, prefixed

STATES = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where a checkpoint keeps its weights; the first that exists is read: an average before the weights."""
_BACKBONES = (".teacher.backbone.", ".weights.", ".student.", ".base_encoder.", ".encoder.")
"""Which of several backbones is read, by the end of its prefix: DINO's average first, then trained ones."""
_NOT_BACKBONE = ("head.", "head_dist.", "decoder.", "decoder_")
_RELATIVE = ".relative_position_bias_table"
_QKV_BIAS = (".attn.q_bias", ".attn.v_bias")
_LAYER_SCALE = re.compile(r"(blocks\.\d+\.)(?:ls([12])\.gamma|gamma_([12]))")


class Checkpoint(NamedTuple):
    """The backbone in a weights file, and what the file records about it."""

    state: dict[str, Tensor]  # the weights by timm's keys, without a prefix
    arch: str | None = None  # the model's name
    softcap: float | None = None  # of the attention logits in training
    student: bool = False  # of MaskEmbed or MIM: its head is not a classifier, and it has no pooling
    layout: str | None = None  # of the file; None = unknown, the keys are unchanged
    config: dict[str, Any] | None = None  # the vision model in transformers' config.json next to it
    grid: tuple[int, int] | None = None  # patches along height and width of its position tables
    norm_eps: float | None = None  # epsilon of the last norm, where it is not the backbone's


def read_checkpoint(path: str | Path, facts: dict | None = None) -> Checkpoint:
    """The backbone in a file, or in a folder of transformers, timm or open_clip; `facts` are its `backbone.json`."""
    path = weight_files.locate(path)
    try:
        config = weight_files.vision_config(path.with_name("config.json"))
        grid = None  # SigLIP 2 records no image size
        if config.get("image_size") and config.get("patch_size"):
            sizes = zip(to_2tuple(config["image_size"]), to_2tuple(config["patch_size"]), strict=True)
            grid = tuple(image // patch for image, patch in sizes)
    except (AttributeError, TypeError, ValueError) as error:
        raise weight_files.damaged(path.with_name("config.json"), error) from error
    found = interpret(weight_files.read_weights(path), str(path))
    facts = facts or weight_files.find_facts(path)
    if facts:
        with prefixed(f"{path}: "):
            grid = describe(empty_model(facts["name"], facts["kwargs"])).grid
        found = found._replace(student=found.student or facts["kwargs"].get("global_pool") == "")
    else:  # of our exports
        facts = {"softcap": config.get("softcap", found.softcap), "norm_eps": config.get("final_norm_eps")}
    softcap = check_softcap(facts["softcap"], f"{path}: ")
    return found._replace(config=config, softcap=softcap, grid=grid, norm_eps=facts.get("norm_eps"))


def interpret(content: Any, path: str) -> Checkpoint:
    """The backbone in the content of a file; `path` is for messages."""
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not weights: give a state dict")
    if {"student", "optimizer", "step", "config"} <= content.keys():
        raise UserError(f"{path} is a checkpoint for resuming a run: give the run's folder")
    states = {key: state for key, value in {"": content, **content}.items() if (state := _tensors(value))}
    if not states:
        raise UserError(f"{path} holds no weights: give a state dict, a dictionary of tensors by name")
    if (first := next((key for key in STATES if key in states), None)) is not None:
        states = {first: states[first]}
    found = []
    for key, state in states.items():
        place = ".weights." if key in ("", *STATES) else f".{key}."
        for layout, prefix in layouts.find(state):
            ends = (index for index, end in enumerate(_BACKBONES) if (place + prefix).endswith(end))
            found.append((next(ends, len(_BACKBONES)), key, layout, prefix))
    if not found:
        return Checkpoint(next(iter(states.values())), *trained_as(content, path))
    lowest = min(rank for rank, *_ in found)
    best = [place for rank, *place in found if rank == lowest]
    if len(best) > 1:
        places = ", ".join(f"{key}.{prefix}".strip(".") for key, _, prefix in best)
        raise UserError(f"{path} holds several backbones ({places}): save one of them alone")
    key, layout, prefix = best[0]
    state = {name[len(prefix) :]: value for name, value in states[key].items() if name.startswith(prefix)}
    try:
        state = layouts.to_timm(state, layout)
    except (IndexError, RuntimeError, TypeError) as error:  # torch's, of a wrong shape
        raise UserError(
            f"{path} holds damaged weights of {layout.name} ({first_line(error)}): copy it again"
        ) from error
    student = bool({key, *prefix.split(".")} & {"student", "encoder"}) or "student_model" in _args(content)
    # A tower of transformers without its pooling head.
    student |= layout is layouts.HF_CLIP and not any(name.startswith("attn_pool.") for name in state)
    return Checkpoint(state, *trained_as(content, path), student, layout.name)


def _tensors(value: Any) -> dict[str, Tensor]:
    """The named tensors of a dictionary, without the names of torch's wrappers."""
    items = value.items() if isinstance(value, dict) else ()
    return {weight_files.unwrapped(k): v for k, v in items if isinstance(k, str) and isinstance(v, Tensor)}


def trained_as(content: dict, path: str) -> tuple[str | None, float | None]:
    """The model's name and soft-cap that a checkpoint records, directly or in its training script's arguments."""
    args = _args(content)
    arch = args.get("student_model") or args.get("model") or content.get("arch")
    if "softcap" in content:
        return arch, check_softcap(content["softcap"], f"{path}: ")
    given = args.get("model_kwargs"), args.get("student_model_kwargs")  # another script's may be of any type
    kwargs = {key: value for part in given if isinstance(part, dict) for key, value in part.items()}
    with prefixed(f"{path}: its arguments: "):
        return arch, split_svit(arch or "", kwargs)[2]


def _args(content: dict) -> dict:
    args = content.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}


def timm_state(checkpoint: Checkpoint, template: nn.Module, path: str) -> dict[str, Tensor]:
    """The weights by the keys of a timm model; position tables keep the file's grid, a student's head is left out.

    LayerScale that the model lacks is folded into the projections before it; one that the file lacks is 1.
    """
    wanted, state = template.state_dict(), checkpoint.state
    if "radio_model.model.patch_generator.pos_embed" in state and not isinstance(template, naflex.NaFlexVit):
        raise UserError(f"{path} has the layout of NVIDIA's C-RADIO: load it as naflexvit_*_radio_*")
    heads = () if checkpoint.student else wanted
    state = {k: v for k, v in state.items() if not k.startswith(_NOT_BACKBONE) or k in heads}
    tables = {key: state.pop(key) for key in [key for key in state if key.endswith(_RELATIVE)]}
    # timm's function reads other layouts of the same weights. It also resamples the model's position tables as if
    # they were square, so it gets a model without any.
    bare = copy.deepcopy(template)
    bare.pos_embed = None
    if isinstance(template, naflex.NaFlexVit) and "pos_embed" in state:
        # There timm's tables have rows and columns.
        grid = checkpoint.grid or table_grid(state, describe(template), path)
        state["pos_embed"] = state["pos_embed"].reshape(1, *grid, -1)
    try:
        state = MODELS[type(template)](state, bare) | tables
    except Exception as error:
        raise misfit(checkpoint, path, f"timm says {first_line(error)}") from error
    # As in published weights of DINOv3.
    state = {key: v for key, v in state.items() if key in wanted or not key.endswith(_QKV_BIAS) or v.any()}
    if any(_LAYER_SCALE.fullmatch(key) for key in state):
        state = fold_layer_scale(state, wanted)
    else:
        scales = (key for key in wanted if _LAYER_SCALE.fullmatch(key))
        state |= {key: torch.ones(wanted[key].shape) for key in scales}
    if missing := sorted(set(wanted) - set(state)):
        raise misfit(checkpoint, path, f"it lacks {missing[0]}")
    if extra := sorted(set(state) - set(wanted)):
        raise misfit(checkpoint, path, f"it also has {extra[0]}")
    check_config(describe(template), checkpoint.config or {}, path)
    return state


def misfit(checkpoint: Checkpoint, path: str, problem: str) -> UserError:
    """The error for weights that do not fit a backbone."""
    if checkpoint.layout is None:
        return UserError(f"{path} has an unknown layout ({problem}): convert it to that of {layouts.READ}")
    arch = f" ({checkpoint.arch})" if checkpoint.arch else ""
    remedy = "give the name and arguments it was built with"
    return UserError(f"{path} holds the weights of another model{arch}: {problem}; {remedy}")


def fold_layer_scale(state: dict[str, Tensor], wanted: Container[str]) -> dict[str, Tensor]:
    """Fold LayerScale that is not wanted into W and b: x + gamma * (W h + b) = x + (gamma W) h + gamma b."""
    state = dict(state)
    for key in [key for key in state if key not in wanted]:
        if (found := _LAYER_SCALE.fullmatch(key)) is None:
            continue
        gamma = state.pop(key).double()
        layer = found[1] + ("attn.proj" if (found[2] or found[3]) == "1" else "mlp.fc2")
        for name, factor in ((f"{layer}.weight", gamma[:, None]), (f"{layer}.bias", gamma)):
            if name in state and len(state[name]) == len(gamma):
                state[name] = (state[name].double() * factor).to(state[name].dtype)
    return state


def table_grid(state: dict[str, Tensor], spec: ViTSpec, path: str) -> tuple[int, int]:
    """The grid of position tables, from their length: a square if possible, else the backbone's grid."""
    rows, columns = spec.grid
    relative = next((value for key, value in state.items() if key.endswith(_RELATIVE)), None)
    if relative is not None:
        found = len(relative) - 3  # three entries are of the class token
        rows, columns = 2 * rows - 1, 2 * columns - 1  # displacements from -(side - 1) to side - 1 each way
    elif spec.position and "pos_embed" in state:
        found = state["pos_embed"].shape[-2] - spec.prefix * spec.position_prefix
    else:
        return spec.grid
    side = math.isqrt(found)
    if side**2 == found:
        return (side, side) if relative is None else ((side + 1) // 2,) * 2
    if rows * columns == found:
        return spec.grid
    wanted = f"{spec.grid[0]}x{spec.grid[1]} patches"
    raise UserError(f"{path}: its {found} positions are neither a square nor {wanted}: set another img_size")


def check_config(spec: ViTSpec, config: dict[str, Any], path: str) -> None:
    """Compare a backbone with the settings in transformers' config.json that weights do not determine."""
    timms = {theirs: timm for timm, theirs in layouts.HF_ACTIVATIONS.items()}
    for key, argument, ours in (
        ("num_attention_heads", "num_heads", spec.block.heads),
        ("hidden_act", "act_layer", layouts.HF_ACTIVATIONS[spec.block.activation]),
    ):
        if (theirs := config.get(key, ours)) != ours:
            remedy = f"give the right name, or {argument}={timms.get(str(theirs), theirs)}"
            raise UserError(f"{path}: config.json has {key}={theirs}, the backbone has {ours}: {remedy}")
