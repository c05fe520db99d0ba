"""Which backbones the authors' `*_model`, `*_pretrained`, `*_checkpoint` and `*_kwargs` mean."""

from pathlib import Path

import timm

from fastalign.backbones.spec import split_svit
from fastalign.backbones.zoo import MOCO
from fastalign.compat.reference_options import Options
from fastalign.utils.errors import UserError


def backbones(v: Options, notes: list[str]) -> tuple[dict, dict]:
    """The keys of `student` and `teacher` that choose the backbones.

    Args:
        v: the authors' options.
        notes: for the user; extended.
    """
    if not v.teacher_pretrained and not v.teacher_checkpoint:
        raise UserError("a teacher needs weights: set teacher_pretrained or teacher_checkpoint")
    sides = {side: _backbone(v, side, notes) for side in ("student", "teacher")}
    found = {(config.mean, config.std) for side in sides.values() if (config := _published(side["name"]))}
    student, teacher = sides.values()
    if len(found) > 1:
        raise UserError(
            f"the authors normalise images as for teacher_model {teacher['name']}, fastalign as for student_model "
            f"{student['name']}, and the two differ: choose a teacher_model of the same kind"
        )
    same = teacher["softcap"] is None and all(student[key] == teacher[key] for key in ("name", "kwargs"))
    if v.drop_path:
        student["kwargs"] = student["kwargs"] | {"drop_path_rate": v.drop_path}
    if same:
        return student, {} if teacher["weights"] == student["weights"] else {"weights": teacher["weights"]}
    if (cap := teacher.pop("softcap")) is not None:  # only an svit_* name gives a teacher a cap of its own
        teacher["name"] = f"s{teacher['name']}"
        if "max_attn_val" in v.model_kwargs | v.teacher_model_kwargs:
            teacher["kwargs"]["max_attn_val"] = cap
    return student, teacher


def _backbone(v: Options, side: str, notes: list[str]) -> dict:
    own, checkpoint, pretrained = (
        getattr(v, f"{side}_{part}") for part in ("model_kwargs", "checkpoint", "pretrained")
    )
    if twice := set(v.model_kwargs) & set(own):
        raise UserError(
            f"{min(twice, key=str)} is in model_kwargs and in {side}_model_kwargs: remove one of them"
        )
    name, kwargs, cap = split_svit(getattr(v, f"{side}_model"), {**v.model_kwargs, **own})
    if "max_attn_val" in kwargs:
        raise UserError(f"max_attn_val is for svit_* models, {side}_model is {name}: remove it")
    _check_size(v, side, name, kwargs)
    # The folder of a run of ours, if it is in the place of the authors' run.
    if checkpoint and not Path(checkpoint).exists() and (Path(checkpoint).parent / "backbone.json").is_file():
        checkpoint = str(Path(checkpoint).parent)
    return {
        "name": _with_tag(name, notes) if pretrained else name,
        "weights": checkpoint or ("pretrained" if pretrained else "random"),
        "kwargs": kwargs,
        "softcap": cap,
    }


def _with_tag(name: str, notes: list[str]) -> str:
    """Untagged SigLIP names mean other weights in today's timm than when the authors' files were written."""
    if "." in name or name == MOCO or not timm.is_model(name):
        return name
    if "_siglip_" in name and f"{name}.webli" in timm.list_pretrained(f"{name}.*"):
        return f"{name}.webli"
    config = _published(name)
    note = f"{name} has no tag: timm's default weights are {config.tag if config else 'none'}"
    if note not in notes:
        notes.append(note)
    return name


def _published(name: str):
    """timm's record of the backbone's published weights; None for a name that it does not know."""
    name = "vit_base_patch16_224.mae" if name == MOCO else name
    try:
        return timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # building the model gives a better message
        return None


def _check_size(v: Options, side: str, name: str, kwargs: dict) -> None:
    """img_size and input_size must be those of the backbone."""
    config = _published(name)
    size = kwargs.get("img_size") or (config.input_size[-1] if config else v.img_size)
    if v.img_size not in (None, size):
        raise UserError(
            f"img_size is {v.img_size} and {side}_model's size {size}: "
            f"write model_kwargs: {{img_size: {v.img_size}}} too"
        )
    if v.input_size not in (None, [3, size, size]):
        raise UserError(f"input_size is {v.input_size}, {side}_model takes [3, {size}, {size}]: remove it")
