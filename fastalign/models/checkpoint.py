"""Files of weights, the authors' `.pth.tar` among them: read without running code from them."""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastalign.errors import UserError
from fastalign.models.svit import is_cap, uncapped
from fastalign.paths import user_path

STATES = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where a checkpoint keeps its weights; the first that is there is read: an average before the weights."""
_WRAPPERS = ("module.", "_orig_mod.", "base_encoder.")
_STUDENT = ("student.", "encoder.")
_NUMPY = "numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray"
HARMLESS = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.bool_)),
    (np.float64(0).__reduce__()[0], f"{_NUMPY}.scalar"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
]
"""What training scripts pickle beside tensors, numbers, texts and containers: their arguments, a NumPy metric.

None of them does anything when it is made. Everything else is refused.
"""


class Checkpoint(NamedTuple):
    """What a file of weights holds."""

    state: dict[str, Tensor]
    """the weights, with no prefix before timm's keys"""
    arch: str | None = None
    """the model's name, where the file tells it"""
    softcap: float | None = None
    """of the attention logits that it was trained with, where the file tells it"""
    student: bool = False
    """a student of MaskEmbed or masked image modeling: its head is not a classifier, and it has no pooling"""
    grid: tuple[int, int] | None = None
    """the patches along height and width that its position tables are of, where that is known"""
    norm_eps: float | None = None
    """epsilon of the last norm, where it is known not to be the backbone's"""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The weights in a file, and what the file tells of their model.

    Raises:
        UserError: no such file, not a weights file, damaged, or one that pickles what is not `HARMLESS`.
    """
    path = Path(user_path(path))
    if not path.is_file():
        raise UserError(f"no weights file at {path}")
    return interpret(read_file(path), str(path))


def interpret(content: Any, path: str) -> Checkpoint:
    """The weights in what a file held: of `STATES` the first, or the dictionary itself."""
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is not a weights file: it holds a {type(content).__name__}; give a state dict"
        )
    key = next((key for key in STATES if content.get(key) is not None), None)
    state = content[key] if key else content
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(
            f"{path} is not a weights file: {key or 'it'} is no dictionary of tensors by name; give a state dict"
        )
    if not state:
        raise UserError(f"{path} holds no weights: give another file")
    state, student = _strip(state)
    if not key:
        return Checkpoint(state, student=student)
    return Checkpoint(state, *trained_as(content, path), student or "student_model" in _arguments(content))


def trained_as(content: dict, path: str) -> tuple[str | None, float | None]:
    """The model's name and the soft-cap that a checkpoint's weights were trained with, as far as it tells.

    Raises:
        UserError: it tells of a cap that is no positive number.
    """
    args = _arguments(content)
    names = (args.get("student_model"), args.get("model"), content.get("arch"))
    arch = next((name for name in names if name and isinstance(name, str)), None)
    if "softcap" in content:
        softcap = content["softcap"]
        if softcap is not None and not is_cap(softcap):
            raise UserError(
                f"{path}: its softcap must be a positive number or None, got {softcap!r}: put it right there"
            )
        return arch, softcap
    given = (args.get("model_kwargs"), args.get("student_model_kwargs"))
    kwargs = {key: value for part in given if isinstance(part, dict) for key, value in part.items()}
    try:
        return arch, uncapped(arch or "", kwargs)[2]
    except UserError as error:
        raise UserError(f"{path}: its arguments: {error}") from None


def _arguments(content: dict) -> dict:
    """Of the training script."""
    args = content.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}


def read_file(path: Path, device: str | torch.device = "cpu") -> Any:
    """What a file holds, read without running code from it.

    Raises:
        UserError: damaged, or it pickles what is not `HARMLESS`.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device=str(device))
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read safely: damaged, cut short or not a weights file ({reason}); copy it again"
        ) from error
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if found:
            reason = f"it pickles {found[1]}, which is no part of a checkpoint; nothing of it was run"
        elif isinstance(error, pickle.UnpicklingError):  # torch's own message is about its arguments
            reason = "damaged, or not written by torch"
        else:
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is not a weights file that can be read safely: {reason}; give a file of tensors only"
        ) from error


def _strip(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Take off the prefixes of wrappers and of a student, in whatever order they stand; was there a student's?"""
    student = False
    while True:
        prefixes = (*_WRAPPERS, *_STUDENT)
        prefix = next((p for p in prefixes if any(key.startswith(p) for key in state)), None)
        if prefix is None:
            return state, student
        student |= prefix in _STUDENT
        state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
