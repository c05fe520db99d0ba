"""Files of weights, read without running code from them."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from fastalign.backbones import layouts
from fastalign.utils.errors import UserError, first_line
from fastalign.utils.paths import user_path

_FOLDER = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "visual.safetensors",
    "backbone.safetensors",
)
"""Weights in a folder; the first that is there is read, whole or in the pieces that its `.index.json` lists."""
_INDEX = ".index.json"
HARMLESS = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.bool_)),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
]
"""What training scripts pickle beside tensors, numbers, texts and containers: their arguments, a NumPy metric.

None of them does anything when it is made. Everything else is refused.
"""


def read_file(path: Path, device: str | torch.device = "cpu") -> Any:
    """What a file holds, read without running code from it.

    Raises:
        UserError: it cannot be opened, is damaged, or pickles what is not `HARMLESS`.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device=str(device))
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # what torch's unpickler raises over other files has no common class
        if isinstance(error, OSError):
            problem, remedy = f"cannot be read ({error.strerror or first_line(error)})", "see that it can"
        elif "TorchScript" in str(error):
            problem = "is a program of TorchScript, as OpenAI publishes CLIP"
            remedy = "give a file of its state_dict()"
        elif found := re.search(r"GLOBAL (\S+)", str(error)):
            problem = f"cannot be read safely: it pickles {found[1]}, which is no part of a checkpoint"
            remedy = "nothing of it was run; give a file of tensors only"
        else:
            problem, remedy = "cannot be read: damaged, cut short or not a weights file", "copy it again"
        raise UserError(f"{path} {problem}; {remedy}") from error


def locate(path: str | Path) -> Path:
    """The file of weights at a path: itself, or that of a folder, which may be the index of its pieces.

    Raises:
        UserError: there is none.
    """
    path = Path(user_path(path))
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"no weights file at {path}: give a file, or a folder that holds one")
    files = (path / f"{name}{end}" for name in _FOLDER for end in ("", _INDEX))
    if (found := next((file for file in files if file.is_file()), None)) is None:
        raise UserError(
            f"no weights in {path}: give a file, the folder of a finished run, or one with {', '.join(_FOLDER)}"
        )
    return found


def read_weights(path: Path) -> Any:
    """What a file holds, or the pieces of an index; of these, those with the backbone are read.

    Raises:
        UserError: damaged, or it pickles what is not `HARMLESS`.
    """
    return _read_pieces(path) if path.name.endswith(_INDEX) else read_file(path)


def _read_pieces(index: Path) -> dict[str, Any]:
    try:
        pieces = {
            layouts.plain(str(name)): str(file) for name, file in read_json(index)["weight_map"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({type(error).__name__}: {error}): copy it again") from None
    prefixes = tuple(prefix for _, prefix in layouts.find(pieces.keys())) or ("",)
    content: dict[str, Any] = {}
    for file in sorted({file for name, file in pieces.items() if name.startswith(prefixes)}):
        path = index.with_name(Path(file).name)
        if not path.is_file():
            raise UserError(f"{index} names {file}, which is not there: copy the whole folder")
        piece = read_file(path)
        if not isinstance(piece, dict):
            raise UserError(
                f"{path} is not a piece of weights: it holds a {type(piece).__name__}; copy it again"
            )
        content |= piece
    return content


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): copy it again") from None
