"""The authors' YAML files as our configuration: each option is mapped, ignored, or refused."""

import difflib
import importlib.util
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastalign.compat.reference_models import backbones
from fastalign.compat.reference_options import (
    IGNORED,
    KEYS,
    MIM_DEFAULTS,
    NOT_MIM,
    REFUSED,
    Options,
)
from fastalign.config import Config, resolve
from fastalign.utils.errors import UserError
from fastalign.utils.yaml_files import explain, merge, read_yaml

AUTHORS_WORLD = 4
"""GPUs of the authors' own command, with which each of their files has 1024 images per update."""
_SPLITS = ("train", "training"), ("val", "valid", "validation", "eval", "evaluation")
"""Names of folders that timm takes for the same split."""


def make_config(
    path: str | Path, overrides: list[str] | None = None, *, world_size: int | None = None
) -> Config:
    """Our configuration of one of the authors' YAML files. Arguments and errors as for `read_reference`."""
    return read_reference(path, overrides, world_size=world_size)[0]


def read_reference(
    path: str | Path, overrides: list[str] | None = None, *, world_size: int | None = None
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
    path, overrides = Path(path), overrides or []
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("objective=")]
    mim = chosen[-1] == "mim" if chosen else path.resolve().parent.name == "configs-mim"
    given, world = read_yaml(path), world_size or int(os.environ.get("WORLD_SIZE", AUTHORS_WORLD))
    notes = [f"{path.name} is in a folder configs-mim: objective=mim"] if mim and not chosen else []
    try:
        given = _mapped(given, mim)
        values = Options.model_validate((MIM_DEFAULTS | given) if mim else given)
        tree = _tree(values, mim, world, notes)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Options.model_fields)[1]}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    batch, passes = values.batch_size, values.grad_accum_steps
    line = f"{batch} images per GPU x {passes} passes x {world} GPUs = {batch * passes * world} images per update; "
    return resolve(tree, overrides, path), [line + "--world-size=N for other GPUs", *notes]


def _mapped(given: dict, mim: bool) -> dict:
    """The options that decide our keys; an error for those that are unknown or refused."""
    ignored = {name for names in IGNORED.values() for name in names.split()}
    known = {*Options.model_fields, *ignored, *REFUSED}
    if "model" in given:
        raise UserError("a file of the authors' finetune.py (option model): use python -m fastalign.classify")
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise UserError(
                f"unknown option {name} (the authors' script ignores it); the nearest is {near[0]}"
            )
        if mim and (name in NOT_MIM or (name in ("skip_blocks", "prefix_only") and value)):
            raise UserError(f"mim.py does not use {name}: remove it")
        if name in REFUSED:
            _check_accepted(name, value, *REFUSED[name])
    return {name: value for name, value in given.items() if name in Options.model_fields}


def _check_accepted(name: str, value: Any, reason: str, *accepted: Any) -> None:
    try:
        same = float(value) in accepted  # YAML 1.1 reads 1e-8 as a text
    except (TypeError, ValueError):
        same = value in accepted or (value is None and "" in accepted)
    if not same:
        remedy = f"remove {name}" if accepted[-1] in (None, "") else f"set {name} to {accepted[-1]}"
        raise UserError(f"{name}={value} is not supported: {reason}; {remedy}")


def _tree(v: Options, mim: bool, world: int, notes: list[str]) -> dict:
    """Our keys, by section."""
    student, teacher = backbones(v, notes)
    if v.amp and v.amp_dtype != "bfloat16":
        raise UserError(f"amp_dtype={v.amp_dtype} is not supported: set amp_dtype: bfloat16")
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
        "optim": _optim(v, world),
        "checkpoint": {"every_steps": v.recovery_interval or None},
        "log": {"to": _sinks(v, notes)},
        "efficiency": {
            "precision": "auto" if v.amp else "fp32",
            "compile": v.torchcompile is not None,
        },
    }
    for name, key in KEYS.items():
        if mim and name in NOT_MIM:
            continue
        value = getattr(v, name)
        if name == "decoder_init_values":
            value = value or None
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merge(tree, value)
    return tree


def _place(v: Options, split: str) -> str | None:
    """Where timm finds a split: its folder, under one of its usual names, or the tar shards that it names."""
    root, dataset = v.data_dir, (v.dataset or "").lower()
    if root is None:
        return None
    if dataset.startswith("wds/"):
        if ".tar" not in split:
            raise UserError(
                f"{split} of dataset {dataset} names no tar shards: write a pattern, such as {{000..099}}.tar"
            )
        return str(Path(root) / split)
    if dataset:
        raise UserError(
            f"dataset {dataset} is not supported: give a folder of images (no dataset) or tar shards (wds/)"
        )
    if Path(root).suffix == ".tar":
        return root
    names = next((names for names in _SPLITS if split in names), ())
    found = next((name for name in (split, *names) if (Path(root) / name).exists()), split)
    return str(Path(root) / found)


def _optim(v: Options, world: int) -> dict:
    unknown = set(v.opt_kwargs) - {"betas", "eps"}
    if unknown or v.opt_kwargs.get("eps", 1e-8) != 1e-8:
        raise UserError(
            f"opt_kwargs.{min(unknown or {'eps'}, key=str)} is not supported, only betas: remove it"
        )
    if v.opt_betas and "betas" in v.opt_kwargs:
        raise UserError("betas are in opt_betas and in opt_kwargs: remove one")
    if v.warmup_epochs and v.warmup_lr != v.min_lr:
        raise UserError(
            f"warmup_lr is {v.warmup_lr}, and the warm-up starts at min_lr: set warmup_lr: {v.min_lr}"
        )
    batch = v.batch_size * v.grad_accum_steps * world
    power = 1.0 if v.lr_base_scale == "linear" else 0.5
    return {
        "batch_size": batch,
        "lr": v.lr or v.lr_base * (batch / v.lr_base_size) ** power,
        "betas": v.opt_betas or v.opt_kwargs.get("betas", [0.9, 0.999]),
        "ema": v.model_ema_decay if v.model_ema else None,
    }


def _sinks(v: Options, notes: list[str]) -> list[str]:
    if not v.log_wandb:
        return []
    if importlib.util.find_spec("wandb") is None:
        notes.append("log_wandb: wandb is not installed, metrics go to metrics.jsonl only; pip install wandb")
        return []
    return [f"wandb:{v.project or 'uncategorized'}"]
