"""The authors' YAML files as our configuration: each option is mapped, ignored, or refused."""

import difflib
import importlib.util
import os
from pathlib import Path
from typing import Any

from fastalign.compat import reference_options as authors
from fastalign.compat.reference_models import backbones
from fastalign.compat.reference_options import OPTIONS
from fastalign.config import Config, resolve
from fastalign.utils.errors import UserError
from fastalign.utils.paths import user_path
from fastalign.utils.yaml_files import merge, read_yaml

AUTHORS_WORLD = 4
"""GPUs of the authors' own command, with which each of their files has 1024 images per update."""
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "evaluation")}
_KINDS = {
    str: "a text", Path: "a path", int: "a whole number", float: "a number", list: "a list of numbers",
    dict: "a mapping", bool: "true or false, without quotes",
}  # fmt: skip


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
    given, world = read_yaml(path), world_size or _world()
    notes = [f"{path.name} is in a folder configs-mim: objective=mim"] if mim and not chosen else []
    try:
        _check_names(given, mim)
        values = {
            name: _value(name, given[name]) if name in given else option.default
            for name, option in OPTIONS.items()
        }
        values |= {name: value for name, value in authors.MIM_DEFAULTS.items() if mim and name not in given}
        for name in ("opt", "sched_on_updates"):  # their default is not supported
            _check_choice(name, values[name], OPTIONS[name].choices)
        tree = _tree(values, mim, world, notes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    batch, passes = values["batch_size"], values["grad_accum_steps"]
    line = f"{batch} images per GPU x {passes} passes x {world} GPUs = {batch * passes * world} images per update; "
    return resolve(tree, overrides, path), [line + "--world-size=N for other GPUs", *notes]


def _world() -> int:
    """torchrun's GPUs, or the authors'."""
    text = os.environ.get("WORLD_SIZE", str(AUTHORS_WORLD))
    if not text.isdecimal() or not int(text):
        raise UserError(
            f"WORLD_SIZE={text} in the environment is not a number of GPUs: unset it, or give --world-size=N"
        )
    return int(text)


def _check_names(given: dict, mim: bool) -> None:
    known = {
        *OPTIONS,
        *authors.REFUSED,
        *(name for names in authors.IGNORED.values() for name in names.split()),
    }
    for name, value in given.items():
        if name in authors.FINETUNE:
            raise UserError(
                f"{name} is an option of the authors' finetune.py: use python -m fastalign.classify, or give a file "
                "of their train.py or mim.py"
            )
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise UserError(
                f"unknown option {name} (the authors' script ignores it); the nearest is {near[0]}"
            )
        if mim and (name in authors.NOT_MIM or (name in ("skip_blocks", "prefix_only") and value)):
            raise UserError(f"mim.py does not use {name}: remove it")
        if name in authors.REFUSED:
            reason, *accepted = authors.REFUSED[name]
            _check_choice(name, value, accepted, f": {reason}")


def _check_choice(name: str, value: Any, choices: tuple | list, reason: str = "") -> None:
    try:
        same = float(value) in choices  # YAML 1.1 reads 1e-8 as a text
    except (TypeError, ValueError):
        same = value in choices or (value is None and "" in choices)
    if not same:
        takes = " or ".join(str(choice) for choice in choices if choice not in (None, ""))
        remedy = f"set {name} to {takes}" if takes else f"remove {name}"
        raise UserError(f"{name}={value} is not supported{reason}; {remedy}")


def _value(name: str, value: Any) -> Any:
    """The value with its option's type."""
    option = OPTIONS[name]
    if value is None and (option.default in (None, "") or name in authors.NULLABLE):
        return None
    try:
        value = _convert(option.kind, value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} must be {_KINDS[option.kind]}, got {value!r}") from None
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if option.choices:
        _check_choice(name, value, option.choices)
    return value


def _convert(kind: type, value: Any) -> Any:
    """As argparse would, without its traps: a text in quotes is never a bool, a number never truncated."""
    if kind in (bool, dict, list):
        if not isinstance(value, kind):
            raise TypeError
        return [float(item) for item in value] if kind is list else value
    if value is None or isinstance(value, (bool, dict, list)):
        raise TypeError
    if kind is Path:
        return user_path(str(value))
    if kind is int and float(value) != int(float(value)):
        raise ValueError
    return kind(float(value)) if kind is int else kind(value)


def _tree(v: dict, mim: bool, world: int, notes: list[str]) -> dict:
    """Our keys, by section."""
    student, teacher = backbones(v, notes)
    batch = v["batch_size"] * v["grad_accum_steps"] * world
    if v["amp"] and v["amp_dtype"] != "bfloat16":
        raise UserError(f"amp_dtype={v['amp_dtype']} is not supported: set amp_dtype: bfloat16")
    if v["aa"] and not v["aa"].startswith("rand"):
        raise UserError(f"aa={v['aa']} is not supported: set aa to a policy rand-..., or to null")
    tree = {
        "output": f"{v['output'] or 'output/train'}/{v['experiment'] or v['student_model']}",
        "objective": "mim" if mim else "maskembed",
        "student": student,
        "teacher": teacher,
        "masks": {"ratio": v.get(f"{v['mask_sampling']}_mask_ratio")},
        "data": {
            "train": _place(v, v["train_split"], "train"),
            "val": _place(v, v["val_split"], "val") if v["val_split"] else None,
            "crop": v["train_crop_mode"] or "rrc",
            "color_jitter": 0.0 if v["aa"] else v["color_jitter"] or 0.0,
            "randaugment": v["aa"] or "",
        },
        "optim": _optim(v, batch),
        "checkpoint": {"every_steps": v["recovery_interval"] or None},
        "log": {"to": _sinks(v, notes)},
        "efficiency": {
            "precision": "auto" if v["amp"] else "fp32",
            "compile": v["torchcompile"] is not None,
        },
    }
    for name, option in OPTIONS.items():
        inherited = name.startswith("decoder_") and name != "decoder_layers" and v[name] == option.default
        if option.key and not inherited and not (mim and name in authors.NOT_MIM):
            value = 0 if mim and name == "skip_blocks" else v[name]
            if name == "decoder_init_values":
                value = value or None
            for part in reversed(option.key.split(".")):
                value = {part: value}
            tree = merge(tree, value)
    return tree


def _place(v: dict, split: str, kind: str) -> str | None:
    """Where timm finds a split: its folder, under one of its usual names, or the tar shards that it names."""
    root, dataset = v["data_dir"], (v["dataset"] or "").lower()
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
    names = _SPLITS[kind] if split in _SPLITS[kind] else ()
    found = next((name for name in (split, *names) if (Path(root) / name).exists()), split)
    return str(Path(root) / found)


def _optim(v: dict, batch: int) -> dict:
    unknown = set(v["opt_kwargs"]) - {"betas", "eps"}
    if unknown or v["opt_kwargs"].get("eps", 1e-8) != 1e-8:
        raise UserError(
            f"opt_kwargs.{min(unknown or {'eps'}, key=str)} is not supported, only betas: remove it"
        )
    if v["opt_betas"] and "betas" in v["opt_kwargs"]:
        raise UserError("betas are in opt_betas and in opt_kwargs: remove one")
    if v["warmup_epochs"] and v["warmup_lr"] != v["min_lr"]:
        raise UserError(
            f"warmup_lr is {v['warmup_lr']}, and the warm-up starts at min_lr: set warmup_lr: {v['min_lr']}"
        )
    if not v["lr"] and v["lr_base_size"] < 1:
        raise UserError(f"lr_base_size must be at least 1, got {v['lr_base_size']}: correct it, or set lr")
    power = 1.0 if v["lr_base_scale"] == "linear" else 0.5
    return {
        "batch_size": batch,
        "lr": v["lr"] or v["lr_base"] * (batch / v["lr_base_size"]) ** power,
        "betas": v["opt_betas"] or v["opt_kwargs"].get("betas", [0.9, 0.999]),
        "ema": v["model_ema_decay"] if v["model_ema"] else None,
    }


def _sinks(v: dict, notes: list[str]) -> list[str]:
    if not v["log_wandb"]:
        return []
    if importlib.util.find_spec("wandb") is None:
        notes.append("log_wandb: wandb is not installed, metrics go to metrics.jsonl only; pip install wandb")
        return []
    return [f"wandb:{v['project'] or 'uncategorized'}"]
