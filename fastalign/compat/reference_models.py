"""The authors' `*_model`, `*_pretrained`, `*_checkpoint` and `*_kwargs`: which backbones they mean."""

from pathlib import Path

import timm

from fastalign.backbones.spec import split_svit
from fastalign.backbones.zoo import MOCO
from fastalign.utils.errors import UserError


def backbones(v: dict, notes: list[str]) -> tuple[dict, dict]:
    """The keys of `student` and `teacher` that say which backbones they are.

    Args:
        v: the value of every option.
        notes: what one should know is added.

    Raises:
        UserError: a combination that fastalign has no counterpart for.
    """
    for name in ("student_model_kwargs", "teacher_model_kwargs"):
        twice = set(v["model_kwargs"]) & set(v[name])
        if twice:
            raise UserError(f"{min(twice, key=str)} is in model_kwargs and in {name}: remove one")
    kwargs = {side: {**v["model_kwargs"], **v[f"{side}_model_kwargs"]} for side in ("student", "teacher")}
    if not v["teacher_pretrained"] and not v["teacher_checkpoint"]:
        raise UserError("a teacher needs weights: set teacher_pretrained or teacher_checkpoint")
    plain, arguments, cap = {}, {}, {}
    for side in ("student", "teacher"):
        name, arguments[side], cap[side] = split_svit(v[f"{side}_model"], kwargs[side])
        if "max_attn_val" in arguments[side]:
            raise UserError(f"max_attn_val is for svit_* models, {side}_model is {name}: remove it")
        plain[side] = _spelt_out(name, v[f"{side}_pretrained"], notes)
        _check_size(v, side, name, arguments[side])
    found = {_constants(plain[side]) for side in plain} - {None}
    if len(found) > 1:
        raise UserError(
            f"the authors normalise images as teacher_model {plain['teacher']} wants them, fastalign as "
            f"student_model {plain['student']} does, and the two differ: choose a teacher_model of the same kind"
        )
    weights = {
        side: _file(v[f"{side}_checkpoint"]) or ("pretrained" if v[f"{side}_pretrained"] else "random")
        for side in ("student", "teacher")
    }
    drop_path = {"drop_path_rate": v["drop_path"]} if v["drop_path"] else {}
    student = {
        "name": plain["student"],
        "weights": weights["student"],
        "kwargs": arguments["student"] | drop_path,
        "softcap": cap["student"],
    }
    same = (plain["student"], arguments["student"]) == (plain["teacher"], arguments["teacher"])
    if same and cap["teacher"] is None:
        return student, {} if weights["teacher"] == weights["student"] else {"weights": weights["teacher"]}
    name = plain["teacher"] if cap["teacher"] is None else f"s{plain['teacher']}"
    return student, {"name": name, "weights": weights["teacher"], "kwargs": kwargs["teacher"]}


def _spelt_out(name: str, pretrained: bool, notes: list[str]) -> str:
    """A name without a tag means what timm says today; for SigLIP that is not what it was."""
    if "." in name or name == MOCO or not pretrained or not timm.is_model(name):
        return name
    if "_siglip_" in name and f"{name}.webli" in timm.list_pretrained(f"{name}.*"):
        return f"{name}.webli"
    config = _published(name)
    note = f"{name} names no weights: timm's default is {config.tag if config else 'none'}"
    notes += [] if note in notes else [note]
    return name


def _constants(name: str) -> tuple | None:
    """What the normalisation of images takes from a backbone."""
    config = _published(name)
    return (config.mean, config.std) if config else None


def _published(name: str):
    """What timm knows of the backbone's published weights; None for a name that it does not know."""
    name = "vit_base_patch16_224.mae" if name == MOCO else name
    try:
        return timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # whoever builds the model says it better
        return None


def _check_size(v: dict, side: str, name: str, kwargs: dict) -> None:
    """img_size and input_size are those of the images: the backbone's, or nothing fits."""
    config = _published(name)
    size = kwargs.get("img_size") or (config.input_size[-1] if config else v["img_size"])
    if v["img_size"] is not None and v["img_size"] != size:
        raise UserError(
            f"img_size is {v['img_size']} and {side}_model's size {size}: "
            f"write model_kwargs: {{img_size: {v['img_size']}}} too"
        )
    if v["input_size"] is not None and v["input_size"] != [3, size, size]:
        raise UserError(f"input_size is {v['input_size']}, {side}_model takes [3, {size}, {size}]: remove it")


def _file(path: str | None) -> str | None:
    """A checkpoint's path; the folder of a run of ours, where that stands in the place of the authors'."""
    if path and not Path(path).exists() and (Path(path).parent / "backbone.json").is_file():
        return str(Path(path).parent)
    return path
