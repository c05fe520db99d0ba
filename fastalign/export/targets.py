"""The libraries that a backbone can be exported to: what fits, the files, and how they are read back."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from fastalign.export import to_onnx, to_open_clip, to_timm, towers
from fastalign.export.run import Run, misfits_of
from fastalign.export.towers import Tokens
from fastalign.utils.errors import UserError, unknown

EXTRA = "'transformers>=5.20' 'open_clip_torch>=3.3' onnx onnxruntime onnxscript"
"""The packages of the extra `export`."""


class Target(NamedTuple):
    """A library's format. The soft-cap to write is the backbone's: None if it is dropped."""

    package: str
    """must be installed"""
    misfits: Callable[[Run], list[str]]
    """what of a backbone the library cannot express; empty = it fits"""
    write: Callable[[Run, Path], list[str] | None]
    """returns sentences for the user"""
    read: Callable[[Path], Tokens]
    """loads the files with the library's own classes"""
    usage: Callable[[Run], str]
    """lines of Python for the model card: with FOLDER and `images`, they compute `tokens`"""
    how_capped: str | None
    """a sentence for the user of a capped export; None = the library cannot cap"""
    notes: tuple[str, ...] = ()
    """sentences for the user"""


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
    target = TARGETS[name]
    if problems := target.misfits(run):
        fitting = ", ".join(other for other in TARGETS if not TARGETS[other].misfits(run))
        raise UserError(
            f"--to {name}: {run.facts['name']} does not fit ({'; '.join(problems[:3])}); what fits: {fitting}"
        )
    return target


def _anything(run: Run) -> list[str]:
    return []


def _only(wanted: dict[str, Any]) -> Callable[[Run], list[str]]:
    return lambda run: misfits_of(wanted, run.vit.spec)


_TIMM = (to_timm.write, to_timm.read)
_HF_NOTES = (towers.HOW_CAPPED, (towers.PROCESSOR_NOTE,))
TARGETS = {
    "timm": Target("timm", _anything, *_TIMM, to_timm.usage, to_timm.HOW_CAPPED),
    **{
        f"hf-{name}": Target("transformers", _only(t.wanted), t.write, towers.read, t.usage, *_HF_NOTES)
        for name, t in towers.TOWERS.items()
    },
    "open-clip": Target(
        "open_clip", to_open_clip.misfits, to_open_clip.write, to_open_clip.read, to_open_clip.usage, None
    ),
    "onnx": Target("onnxruntime", _anything, to_onnx.write, to_onnx.read, to_onnx.usage, to_onnx.HOW_CAPPED),
    "prismatic": Target(
        "timm",
        _only({"block.qkv": "fused", "rotary": False}),
        *_TIMM,
        to_timm.prismatic_usage,
        to_timm.HOW_CAPPED,
    ),
}
