"""The authors' YAML files as our configuration: each option is mapped, ignored, or refused."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import timm
from pydantic import ValidationError

from fastalign.backbones.spec import split_svit
from fastalign.backbones.zoo import MOCO
from fastalign.compat.reference_options import IGNORED, KEYS, MIM_DEFAULTS, NOT_MIM, REFUSED, Options
from fastalign.config import Config, resolve
from fastalign.utils.errors import UserError
from fastalign.utils.sections import explain, read_yaml, set_key

AUTHORS_WORLD = 4
"""GPUs of the authors' own command, with which each of their files has 1024 images per update."""
_SPLITS = ("train", "training"), ("val", "valid", "validation", "eval", "evaluation")
"""Names of folders that timm takes for the same split."""


def make_config(path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> Config:
    """Our configuration of one of the authors' YAML files. Arguments and errors as for `read_reference`."""
    return read_reference(path, overrides, world_size=world_size)[0]


def read_reference(
    path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None
) -> tuple[Config, list[str]]:
    """Our configuration of one of the authors' YAML files, and notes for the user.

    Args:
        path: a file for their train.py or mim.py. It is for mim.py if `objective=mim` is among the overrides, or if
            its folder is called configs-mim.
        overrides: "section.key=value" each, of our keys.
        world_size: the GPUs that `batch_size` is multiplied by; default those of torchrun, else 4.

    Raises:
        UserError: no such file, an unknown option, or a value that is not supported.
    """
    path = Path(path)
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("objective=")]
    mim = chosen[-1] == "mim" if chosen else path.resolve().parent.name == "configs-mim"
    given, world = read_yaml(path), world_size or int(os.environ.get("WORLD_SIZE", AUTHORS_WORLD))
    try:
        _check(given, mim)
        options = {name: given[name] for name in given if name not in IGNORED and name not in REFUSED}
        v = Options.model_validate((MIM_DEFAULTS | options) if mim else options)
        tree = _tree(v, mim, v.batch_size * v.grad_accum_steps * world)
    except ValidationError as error:
        names = [*Options.model_fields, *IGNORED, *REFUSED]
        raise UserError(f"{path}: {explain(error, names)[1]}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    images = f"{v.batch_size} images per GPU x {v.grad_accum_steps} passes x {world} GPUs"
    notes = [f"{images} = {tree['optim']['batch_size']} images per update; --world-size=N for other GPUs"]
    if mim and not chosen:
        notes.append(f"{path.name} is in a folder configs-mim: objective=mim")
    if v.log_wandb and not tree["log"]["to"]:
        notes.append("log_wandb: wandb is not installed, metrics go to metrics.jsonl only; pip install wandb")
    return resolve(tree, list(overrides), path), notes


def _check(given: dict, mim: bool) -> None:
    """Refuse options that are not of this script, and values that are not supported."""
    if "model" in given:
        raise UserError("a file of the authors' finetune.py (option model): use fastalign classify")
    for name, value in given.items():
        if mim and (name in NOT_MIM or (name in ("skip_blocks", "prefix_only") and value)):
            raise UserError(f"mim.py does not use {name}: remove it")
        if value not in REFUSED.get(name, (value,)):
            raise UserError(
                f"{name}={value} is not supported: remove it; docs/reference-configs.md gives the reason"
            )


def _tree(v: Options, mim: bool, batch_size: int) -> dict:
    """Our keys, by section."""
    student, teacher = _backbones(v)
    if v.amp and v.amp_dtype != "bfloat16":
        raise UserError(f"amp_dtype={v.amp_dtype} is not supported: set amp_dtype: bfloat16")
    if v.aa and not v.aa.startswith("rand"):
        raise UserError(f"aa={v.aa} is not supported: give rand-..., or remove it")
    if v.warmup_epochs and v.warmup_lr != v.min_lr:
        raise UserError(
            f"warmup_lr is {v.warmup_lr}, and the warm-up starts at min_lr: set warmup_lr: {v.min_lr}"
        )
    logs = v.log_wandb and importlib.util.find_spec("wandb") is not None
    power = 1.0 if v.lr_base_scale == "linear" else 0.5
    tree = {
        "output": f"{v.output or 'output/train'}/{v.experiment or v.student_model}",
        "objective": "mim" if mim else "maskembed",
        "student": student,
        "teacher": teacher,
        "masks": {"ratio": getattr(v, f"{v.mask_sampling}_mask_ratio", None)},
        "data": {
            "train": _place(v, v.train_split),
            "val": _place(v, v.val_split) if v.val_split else None,
            "crop": v.train_crop_mode or "rrc",
            "color_jitter": 0.0 if v.aa else v.color_jitter or 0.0,
            "randaugment": v.aa or "",
        },
        "optim": {
            "batch_size": batch_size,
            "lr": v.lr or v.lr_base * (batch_size / v.lr_base_size) ** power,
            "betas": v.opt_kwargs.betas or v.opt_betas or [0.9, 0.999],
            "ema": v.model_ema_decay if v.model_ema else None,
        },
        "checkpoint": {"every_steps": v.recovery_interval or None},
        "log": {"to": [f"wandb:{v.project or 'uncategorized'}"] if logs else []},
        "efficiency": {
            "precision": "auto" if v.amp else "fp32",
            "compile": v.torchcompile is not None,
        },
    }
    for name, key in KEYS.items():
        if not (mim and name in NOT_MIM):
            set_key(tree, key.split("."), getattr(v, name))
    if v.decoder_init_values == 0 and not mim:
        set_key(tree, ["decoder", "kwargs", "init_values"], None)
    return tree


def _backbones(v: Options) -> tuple[dict, dict]:
    """The keys of `student` and `teacher` that choose the backbones."""
    if not v.teacher_pretrained and not v.teacher_checkpoint:
        raise UserError("a teacher needs weights: set teacher_pretrained or teacher_checkpoint")
    student, teacher = _backbone(v, "student"), _backbone(v, "teacher")
    norms = {norm for side in (student, teacher) if (norm := _normalisation(side["name"]))}
    if len(norms) > 1:
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


def _backbone(v: Options, side: str) -> dict:
    own, checkpoint, pretrained = (
        getattr(v, f"{side}_{part}") for part in ("model_kwargs", "checkpoint", "pretrained")
    )
    name, kwargs, cap = split_svit(getattr(v, f"{side}_model"), {**v.model_kwargs, **own})
    if v.img_size not in (None, kwargs.get("img_size")):
        raise UserError(f"img_size is {v.img_size}: write model_kwargs: {{img_size: {v.img_size}}} too")
    if pretrained and "_siglip_" in name and "." not in name:
        name += ".webli"  # timm's default when the authors' files were written; today it is SigLIP 2
    # The folder of a run of ours, if it is in the place of the authors' run.
    if checkpoint and not Path(checkpoint).exists() and (Path(checkpoint).parent / "backbone.json").is_file():
        checkpoint = str(Path(checkpoint).parent)
    weights = checkpoint or ("pretrained" if pretrained else "random")
    return {"name": name, "weights": weights, "kwargs": kwargs, "softcap": cap}


def _normalisation(name: str) -> tuple | None:
    """Mean and standard deviation of the images for a backbone; None for a name that timm does not know."""
    try:
        config = timm.get_pretrained_cfg("vit_base_patch16_224.mae" if name == MOCO else name)
    except RuntimeError:  # building the model gives a better message
        return None
    return config and (config.mean, config.std)


def _place(v: Options, split: str) -> str | None:
    """Where timm finds a split: its folder, under one of its usual names, or the tar shards that it names."""
    root, dataset = v.data_dir, (v.dataset or "").lower()
    if root is None or Path(root).suffix == ".tar":
        return root
    if dataset.startswith("wds/") and ".tar" in split:
        return str(Path(root) / split)
    if dataset:
        raise UserError(
            f"dataset {dataset} with the split {split} is not supported: give a folder of images (no dataset), "
            "or wds/ and patterns of tar shards as splits, such as {000..099}.tar"
        )
    names = next((names for names in _SPLITS if split in names), ())
    found = next((name for name in (split, *names) if (Path(root) / name).exists()), split)
    return str(Path(root) / found)
