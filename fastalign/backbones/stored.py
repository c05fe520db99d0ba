"""What is written in or beside a file of weights about the backbone that it holds."""

import json
from pathlib import Path

import safetensors

from fastalign.backbones.spec import check_softcap
from fastalign.utils.errors import UserError

_TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
"""The weights in a folder of timm's format, which is that of `fastalign.export --to timm`."""


def read_facts(path: Path) -> dict:
    """A run's `backbone.json`: "name", "kwargs", "softcap" and more.

    Raises:
        UserError: it is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"no backbone at {path}: give the folder of a finished run, or its backbone.json")
    return _parsed(path.read_bytes(), str(path))


def facts_within(path: Path) -> str | None:
    """The text of `backbone.json` that a run's weights file carries; None where it is missing or cannot be read."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("facts")
    except (OSError, safetensors.SafetensorError):
        return None


def facts_of(path: Path) -> dict | None:
    """The facts that a weights file carries, or those of timm's `config.json` beside it; None where there are none.

    Args:
        path: the file.

    Raises:
        UserError: they are damaged.
    """
    text = facts_within(path) if path.suffix == ".safetensors" else None
    if text is not None:
        return _parsed(text, str(path))
    config = path.with_name("config.json")
    return _of_timm(config) if path.name in _TIMM_FILES and config.is_file() else None


def _parsed(text: str | bytes, where: str) -> dict:
    try:
        facts = json.loads(text)
        facts["name"], facts["kwargs"], facts["softcap"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is damaged ({type(error).__name__}: {error}): copy it again") from error
    return _checked(facts, where)


def _checked(facts: dict, where: str) -> dict:
    name, kwargs = facts["name"], facts["kwargs"]
    if not isinstance(name, str) or not isinstance(kwargs, dict):
        raise UserError(f"{where} is damaged (name {name!r}, kwargs {kwargs!r}): copy it again")
    check_softcap(facts["softcap"], f"{where}: ")
    return facts


def _of_timm(path: Path) -> dict | None:
    """As a run's facts. A `config.json` of another library's is none of timm's."""
    try:
        config = json.loads(path.read_bytes())
        size = config["pretrained_cfg"]["input_size"][-2:]
        kwargs = {"img_size": size, **config.get("model_args", {})}
        name, softcap = kwargs.pop("architecture", config["architecture"]), kwargs.pop("softcap", None)
    except (ValueError, KeyError, TypeError):
        return None
    return _checked({"name": name, "kwargs": kwargs, "softcap": softcap}, str(path))
