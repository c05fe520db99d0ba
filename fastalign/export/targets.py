"""The libraries that a backbone can be exported to: what fits, the files, and how they are read back."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fastalign.export import timm_model, to_onnx, to_transformers
from fastalign.export.run import Run
from fastalign.export.to_transformers import misfits_of
from fastalign.utils.errors import UserError, unknown

EXTRA = "'transformers>=5.20' onnx onnxruntime onnxscript"
"""The packages of the extra `export`."""


class Target(NamedTuple):
    """A library's format. The soft-cap to write is the backbone's: None if it is dropped."""

    package: str  # must be installed
    misfits: Callable[[Run], list[str]]  # what of a backbone the library cannot express; empty = it fits
    write: Callable[[Run, Path], list[str]]  # returns sentences for the user
    read: Callable[[Path], Callable[[Tensor], Tensor]]
    """loads the files with the library's own classes: from images to all tokens, prefix first"""
    how_capped: str  # a sentence for the user of a capped export


def check_names(names: list[str], key: str) -> None:
    """Refuse a name that is no target, or whose library is missing, in a list that a key gives."""
    for name in names:
        if name not in TARGETS:
            raise UserError(f"{key}: {unknown('target', name, TARGETS)}; choose from {', '.join(TARGETS)}")
        if find_spec(TARGETS[name].package) is None:
            raise UserError(f"{key}: {name} needs {TARGETS[name].package}: pip install {EXTRA}")


def find_target(name: str, run: Run) -> Target:
    """The target of a name, checked against the backbone."""
    check_names([name], "--to")
    target, backbone = TARGETS[name], run.facts["name"]
    if problems := target.misfits(run):
        fitting = ", ".join(other for other in TARGETS if not TARGETS[other].misfits(run))
        raise UserError(
            f"--to {name}: {backbone} does not fit ({'; '.join(problems[:3])}); what fits: {fitting}"
        )
    return target


_TIMM = Target("timm", lambda run: [], timm_model.write, timm_model.read, timm_model.HOW_CAPPED)
TARGETS = {
    "timm": _TIMM,
    **{
        f"hf-{name}": Target(
            "transformers",
            partial(misfits_of, wanted),
            partial(to_transformers.write, name),
            to_transformers.read,
            to_transformers.HOW_CAPPED,
        )
        for name, wanted in to_transformers.WANTED.items()
    },
    "onnx": Target("onnxruntime", _TIMM.misfits, to_onnx.write, to_onnx.read, to_onnx.HOW_CAPPED),
    "prismatic": _TIMM._replace(misfits=partial(misfits_of, {"qkv": "fused", "rotary": False})),
}
