"""The authors' YAML files: each option mapped to our key, ignored because it changes nothing, or refused by name."""

import difflib
import importlib.util
import os
from pathlib import Path
from typing import Any

from fastalign.compat.reference_models import backbones
from fastalign.compat.reference_options import FINETUNE, MIM_DEFAULTS, NOT_MIM, NULLABLE, OPTIONS
from fastalign.config import Config, resolve
from fastalign.utils.errors import UserError
from fastalign.utils.paths import user_path
from fastalign.utils.yaml_files import read_yaml

AUTHORS_WORLD = 4
"""GPUs of the authors' own command, with which each of their files comes to 1024 images an update."""
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
    """Our configuration of one of the authors' YAML files, and what one should know about it.

    Args:
        path: a file for their train.py or mim.py. No file says for which: it is mim.py's where `objective=mim` is
            among the overrides, or its folder is called configs-mim.
        overrides: "section.key=value" each, of our keys.
        world_size: the GPUs that `batch_size` is multiplied by; default those of torchrun, else 4.

    Raises:
        UserError: no such file, an unknown option, a value that fastalign has no counterpart for.
    """
    path, overrides = Path(path), overrides or []
    given = read_yaml(path)
    _check_names(path, given)
    default = "mim" if path.resolve().parent.name == "configs-mim" else "maskembed"
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("objective=")]
    mim = (chosen[-1] if chosen else default) == "mim"
    if mim:
        _check_mim(path, given)
    defaults = {name: option.default for name, option in OPTIONS.items()} | (MIM_DEFAULTS if mim else {})
    values = {name: _value(path, name, given.get(name, defaults[name])) for name in OPTIONS}
    world = world_size or _world()
    batch, passes = values["batch_size"], values["grad_accum_steps"]
    notes = [
        f"{batch} images a GPU x {passes} passes x {world} GPUs = {batch * passes * world} images an update; "
        "--world-size=N for other GPUs"
    ]
    if mim and not chosen:
        notes.append("a file of the folder configs-mim: objective=mim")
    try:
        tree = _tree(values, mim, world, notes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return resolve(tree, overrides, path), notes


def _world() -> int:
    """torchrun's GPUs, or the authors'."""
    text = os.environ.get("WORLD_SIZE", str(AUTHORS_WORLD))
    if not text.isdecimal() or not int(text):
        raise UserError(
            f"WORLD_SIZE={text} in the environment is no number of GPUs: unset it, or --world-size=N"
        )
    return int(text)


def _check_names(path: Path, given: dict) -> None:
    for name in given:
        if name in FINETUNE:
            raise UserError(
                f"{path}: {name} is an option of the authors' finetune.py: python -m fastalign.classify does that; "
                "give a file of their train.py or mim.py"
            )
        if name not in OPTIONS:
            near = difflib.get_close_matches(str(name), OPTIONS, n=1, cutoff=0.0)
            raise UserError(
                f"{path}: unknown option {name} (the authors' script ignores it); the nearest is {near[0]}"
            )


def _check_mim(path: Path, given: dict) -> None:
    found = [name for name in NOT_MIM if name in given]
    found += [name for name in ("skip_blocks", "prefix_only") if given.get(name)]
    if found:
        raise UserError(f"{path}: mim.py has no use for {found[0]}: remove it")


def _value(path: Path, name: str, value: Any) -> Any:
    """The value with its option's type; refused where fastalign has nothing for it."""
    option = OPTIONS[name]
    if option.fate == "ignored":
        return None
    if value is None and (option.default is None or option.default == "" or name in NULLABLE):
        converted = None
    else:
        try:
            converted = _convert(option.kind, value)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{path}: {name} must be {_KINDS[option.kind]}, got {value!r}") from None
        except UserError as error:
            raise UserError(f"{path}: {name}: {error}") from None
    if option.choices and converted not in option.choices:
        takes = " or ".join("nothing" if choice in (None, "") else str(choice) for choice in option.choices)
        why = f": {option.note}" if option.fate == "refused" else ""
        raise UserError(f"{path}: {name}={value} is not in fastalign{why}; set {name} to {takes}".replace(
            "set " + name + " to nothing", f"remove {name}"
        ))  # fmt: skip
    return converted


def _convert(kind: type, value: Any) -> Any:
    """As argparse would, but for its traps: a text in quotes is never a bool, a number never cut."""
    if kind is bool or kind is dict or kind is list:
        if not isinstance(value, kind):
            raise TypeError
        return [float(item) for item in value] if kind is list else value
    if isinstance(value, (bool, dict, list)) or value is None:
        raise TypeError
    if kind is Path:
        return user_path(str(value))
    if kind is int and float(value) != int(float(value)):
        raise ValueError
    return kind(float(value)) if kind is int else kind(value)


def _tree(v: dict, mim: bool, world: int, notes: list[str]) -> dict:
    """The keys of ours, section by section."""
    student, teacher = backbones(v, notes)
    batch = v["batch_size"] * v["grad_accum_steps"] * world
    ratio = {"bernoulli": v["bernoulli_mask_ratio"], "blockwise": v["blockwise_mask_ratio"]}
    tree = {
        "output": f"{v['output'] or 'output/train'}/{v['experiment'] or v['student_model']}",
        "seed": v["seed"],
        "objective": "mim" if mim else "maskembed",
        "student": {**student, "head": v["student_head"]},
        "teacher": {**teacher, "skip_blocks": 0 if mim else v["skip_blocks"]},
        "masks": {
            "distribution": v["mask_sampling"],
            "ratio": ratio.get(v["mask_sampling"]),
            "complement": v["antithetical_sampling"],
            "full": v["include_null_mask"],
        },
        "loss": {"name": v["loss_function"]},
        "data": _data(v),
        "optim": _optim(v, batch),
        "checkpoint": {"every_steps": v["recovery_interval"] or None, "keep": v["checkpoint_hist"]},
        "log": {"every_steps": v["log_interval"], "to": _sinks(v, notes)},
        "efficiency": {
            "precision": _precision(v),
            "compile": v["torchcompile"] is not None,
            "grad_checkpointing": v["grad_checkpointing"],
        },
    }
    if not mim:
        tree["student"]["freeze"] = v["freeze_student"]
        tree["teacher"]["prefix_only"] = v["prefix_only"]
        names = ("width", "num_heads", "qk_norm", "qkv_bias", "init_values")
        parts = {name: v[f"decoder_{name}"] for name in names}
        parts["init_values"] = parts["init_values"] or None
        kwargs = {
            name.removeprefix("num_"): value
            for name, value in parts.items()
            if value != OPTIONS[f"decoder_{name}"].default
        }
        tree["decoder"] = {"layers": v["decoder_layers"], "kwargs": kwargs}
    return tree


def _data(v: dict) -> dict:
    if v["aa"] and not v["aa"].startswith("rand"):
        raise UserError(
            f"aa={v['aa']} is not in fastalign: of timm's policies it has rand-...; set aa to one, or null"
        )
    return {
        "train": _place(v, v["train_split"], "train"),
        "val": _place(v, v["val_split"], "val") if v["val_split"] else None,
        "crop": v["train_crop_mode"] or "rrc",
        "scale": v["scale"],
        "ratio": v["ratio"],
        "hflip": v["hflip"],
        "color_jitter": 0.0 if v["aa"] else v["color_jitter"] or 0.0,
        "randaugment": v["aa"] or "",
        "mixup": v["mixup"],
        "cutmix": v["cutmix"],
    }


def _place(v: dict, split: str, kind: str) -> str | None:
    """Where timm finds a split: its folder, or one of another name for the same, or the tar shards it names."""
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
            f"dataset {dataset} is not in fastalign: give a folder of images (no dataset) or tar shards (wds/)"
        )
    if Path(root).suffix == ".tar":
        return root
    names = next((names for names in _SPLITS.values() if split in names), ())
    found = next((name for name in (split, *names) if (Path(root) / name).exists()), split)
    return str(Path(root) / found)


def _optim(v: dict, batch: int) -> dict:
    unknown = set(v["opt_kwargs"]) - {"betas", "eps"}
    if unknown or v["opt_kwargs"].get("eps", 1e-8) != 1e-8:
        raise UserError(
            f"opt_kwargs.{min(unknown or {'eps'}, key=str)} is not in fastalign: only betas; remove it"
        )
    if v["opt_betas"] and "betas" in v["opt_kwargs"]:
        raise UserError("betas are in opt_betas and in opt_kwargs: remove one")
    if v["warmup_epochs"] and v["warmup_lr"] != v["min_lr"]:
        raise UserError(
            f"warmup_lr is {v['warmup_lr']}, and the warm-up starts at min_lr: set warmup_lr: {v['min_lr']}"
        )
    return {
        "name": v["opt"],
        "batch_size": batch,
        "accumulate": v["grad_accum_steps"],
        "epochs": v["epochs"],
        "lr": v["lr"] or _scaled_lr(v, batch),
        "min_lr": v["min_lr"],
        "warmup_epochs": v["warmup_epochs"],
        "weight_decay": v["weight_decay"],
        "betas": v["opt_betas"] or v["opt_kwargs"].get("betas", [0.9, 0.999]),
        "clip": v["clip_grad"],
        "ema": v["model_ema_decay"] if v["model_ema"] else None,
    }


def _scaled_lr(v: dict, batch: int) -> float:
    if v["lr_base_size"] < 1:
        raise UserError(f"lr_base_size must be at least 1, got {v['lr_base_size']}: correct it, or set lr")
    share = batch / v["lr_base_size"]
    return v["lr_base"] * (share if v["lr_base_scale"] == "linear" else share**0.5)


def _precision(v: dict) -> str:
    if v["amp"] and v["amp_dtype"] != "bfloat16":
        raise UserError(f"amp_dtype={v['amp_dtype']} is not in fastalign: set amp_dtype: bfloat16")
    return "auto" if v["amp"] else "fp32"


def _sinks(v: dict, notes: list[str]) -> list[str]:
    if not v["log_wandb"]:
        return []
    if importlib.util.find_spec("wandb") is None:
        notes.append("log_wandb: wandb is not installed, metrics go to metrics.jsonl only; pip install wandb")
        return []
    return [f"wandb:{v['project'] or 'uncategorized'}"]
