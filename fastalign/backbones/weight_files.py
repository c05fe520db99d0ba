"""Read weights files and the metadata beside them without running any code in them; write those of a run."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from fastalign.backbones import layouts
from fastalign.backbones.vit import ViT
from fastalign.utils.errors import UserError, first_line
from fastalign.utils.files import user_path, write_atomically, write_tensors

_NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "backbone.safetensors",
)
"""Weights in a folder; the first that exists is read, whole or in the shards that its `.index.json` lists."""
_INDEX = ".index.json"
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_SAFE_GLOBALS = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.bool_)),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
]
"""Classes without side effects that training scripts pickle: their arguments, and NumPy numbers."""
_NOT_SAVED = re.compile(r"^(\.|$|head|(fc_)?norm\.eps)|\b(drop_path|training|backend|fused_attn|_\w+)\b")
"""Settings of a backbone that do not decide its tokens, or that `backbone.json` has."""
HF_DEFAULTS = {
    "clip_vision_model": {"hidden_act": "quick_gelu", "num_attention_heads": 12},
    "siglip_vision_model": {"hidden_act": "gelu_pytorch_tanh", "num_attention_heads": 12},
    "siglip2_vision_model": {"hidden_act": "gelu_pytorch_tanh", "num_attention_heads": 12},
    "vit": {"hidden_act": "gelu", "num_attention_heads": 12},
    "dinov2": {"hidden_act": "gelu", "num_attention_heads": 12},
    "dinov2_with_registers": {"hidden_act": "gelu", "num_attention_heads": 12},
    "dinov3_vit": {"hidden_act": "gelu", "num_attention_heads": 6},
}
"""By model type: transformers' defaults for keys that a config.json may omit, as that of google/siglip-base does."""


def unwrapped(name: str) -> str:
    """A key without the names of torch's wrappers (DDP, compile, FSDP)."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def locate(path: str | Path) -> Path:
    """The weights file at a path: the file itself, or the one in a folder, which may be an index of shards."""
    path = Path(user_path(path))
    if path.is_file():
        return path
    files = (path / f"{name}{end}" for name in _NAMES for end in ("", _INDEX))
    if (found := next((file for file in files if file.is_file()), None)) is None:
        raise UserError(f"no weights in {path}: give a file or a folder with {', '.join(_NAMES)}")
    return found


def read_file(path: Path, device: str | torch.device = "cpu") -> Any:
    """The content of a safetensors file, or of one of `torch.save`.

    UserError: it cannot be opened, is damaged, or pickles what is not in `_SAFE_GLOBALS`.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device=str(device))
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch's unpickler raises errors of many classes
        problem = "is damaged, cut short or not a weights file: copy it again"
        if isinstance(error, OSError):
            problem = f"cannot be read ({error.strerror or first_line(error)}): check the path"
        elif "TorchScript" in str(error):
            problem = "is a TorchScript program, as OpenAI publishes CLIP: give a file of its state_dict()"
        elif found := re.search(r"GLOBAL (\S+)", str(error)):
            problem = f"pickles {found[1]}, which is not safe: no code was run; give a file of tensors"
        raise UserError(f"{path} {problem}") from error


def read_weights(path: Path) -> Any:
    """The content of a file, or of those shards of an index that hold a backbone. Raises like `read_file`."""
    if not path.name.endswith(_INDEX):
        return read_file(path)
    content: dict[str, Any] = {}
    try:
        shards = {unwrapped(name): str(file) for name, file in read_json(path)["weight_map"].items()}
        prefixes = tuple(prefix for _, prefix in layouts.find(shards.keys())) or ("",)
        for file in sorted({file for name, file in shards.items() if name.startswith(prefixes)}):
            content |= read_file(path.with_name(Path(file).name))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from error
    return content


def read_json(path: Path) -> Any:
    """The content of a JSON file; a UserError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> UserError:
    """The error for a file whose content is not what it should be."""
    return UserError(f"{path} is damaged ({type(error).__name__}: {error}): copy it again")


def read_facts(path: Path) -> dict:
    """A run's `backbone.json`: "name", "kwargs", "softcap" and more."""
    if not path.is_file():
        raise UserError(f"no backbone at {path}: give a finished run (student.freeze writes none)")
    return _parsed(path.read_bytes(), path)


def embedded_facts(path: Path) -> str | None:
    """The text of `backbone.json` in a run's weights file; None if it is missing or unreadable."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("facts")
    except (OSError, safetensors.SafetensorError):
        return None


def find_facts(path: Path) -> dict | None:
    """The facts in a weights file, or in timm's `config.json` next to it; None if there are none."""
    text = embedded_facts(path) if path.suffix == ".safetensors" else None
    if text is not None:
        return _parsed(text, path)
    if path.name not in _NAMES[:2]:  # timm's; other files in the folder are not what config.json describes
        return None
    path = path.with_name("config.json")
    try:
        config = json.loads(path.read_bytes())
        kwargs = {"img_size": config["pretrained_cfg"]["input_size"][-2:], **config.get("model_args", {})}
        name, softcap = kwargs.pop("architecture", config["architecture"]), kwargs.pop("softcap", None)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # of another library
    return {"name": name, "kwargs": kwargs, "softcap": softcap}


def _parsed(text: str | bytes, path: Path) -> dict:
    try:
        facts = json.loads(text)
        return facts | {"name": facts["name"], "kwargs": dict(facts["kwargs"]), "softcap": facts["softcap"]}
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error


def vision_config(path: Path) -> dict[str, Any]:
    """The vision model in transformers' config.json, with transformers' defaults."""
    config = read_json(path) if path.is_file() else {}
    if "model_type" not in config:
        return {}
    vision = config.get("vision_config", config)
    return HF_DEFAULTS.get(vision.get("model_type", f"{config['model_type']}_vision_model"), {}) | vision


def save_backbone(student: nn.Module, folder: str | Path, **facts: Any) -> None:
    """Save the backbone of a student, without its head and decoder, as a run does; every command reads the folder.

    With several ranks, call it on one of them.

    Args:
        student: a student of fastalign or a `ViT`, also wrapped in DDP or torch.compile. Weights are written in
            fp32, with soft-cap, preprocessing and timm name.
        folder: where to write; created if missing. Earlier files there are replaced.
        **facts: more JSON values to record, such as `step`, `val_loss`, or `weights`: "pretrained" or the file that
            the student started from, which an export needs to name the licence.

    Raises:
        UserError: another kind of module, a backbone that its timm name does not build, or `folder` is a file.
    """
    student = getattr(student, "module", student)
    vit = getattr(student, "encoder", student)
    vit = getattr(vit, "_orig_mod", vit)
    if not isinstance(vit, ViT):
        raise UserError(f"save_backbone: got {type(vit).__name__}; give a student or a fastalign backbone")
    if taken := facts.keys() & {"name", "kwargs", "softcap", "norm_eps"}:
        raise UserError(
            f"save_backbone: {min(taken)} is set from the student: choose another name for your value"
        )
    if Path(folder).is_file():
        raise UserError(f"save_backbone: {folder} is not a directory; name another folder")
    if any(value.is_meta for value in vit.state_dict().values()):
        raise UserError("save_backbone: weights are on the meta device; load them first")
    facts = backbone_facts(vit, **facts)
    _check_unchanged(vit, facts)
    weights = {key: value.clone() for key, value in vit.state_dict().items()}  # tied ones too get a copy
    write_backbone(Path(folder), weights, facts_text(facts))


def _check_unchanged(vit: ViT, facts: dict[str, Any]) -> None:
    """Raise a UserError if the facts do not build this backbone, but for the values of its weights."""
    from fastalign.backbones.describe import empty_model, from_timm  # imports timm, which takes a second

    loaded = from_timm(empty_model(facts["name"], facts["kwargs"]))
    loaded.softcap = vit.softcap
    ours, theirs = _settings(vit), _settings(loaded)
    for name in sorted(ours.keys() | theirs.keys()):
        if (found := ours.get(name)) != (wanted := theirs.get(name)):
            problem = f"{name} is {found}, but {wanted} in the {facts['name']} that load_backbone builds"
            raise UserError(f"save_backbone: {problem}: undo it, or make it an argument of create_backbone")


def _settings(vit: ViT) -> dict[str, Any]:
    """Types and attributes of the parts, and shapes of the weights, as far as they decide the tokens."""
    found: dict[str, Any] = {unwrapped(key): tuple(v.shape) for key, v in vit.state_dict().items()}
    for path, part in vit.named_modules(remove_duplicate=False):
        if not _WRAPPERS & part._modules.keys():
            own = {"": type(part).__name__} | vars(part) | vars(getattr(part, "spec", part))
            for key, value in own.items():
                if isinstance(value, int | float | str | tuple) or key == "forward":
                    found[unwrapped(f"{path}.{key}".removesuffix("."))] = value
    return {name: value for name, value in found.items() if not _NOT_SAVED.search(name)}


def backbone_facts(vit: ViT, **facts: Any) -> dict[str, Any]:
    """The content of `backbone.json`: what is needed to use the backbone, and `facts`."""
    kwargs = {**vit.recipe["kwargs"], "num_classes": 0}
    if vit.spec.pool == "map" and vit.attn_pool is None:
        kwargs["global_pool"] = ""  # a student has no pooling to save
    return {
        "name": vit.recipe["name"],
        "kwargs": kwargs,
        "softcap": vit.softcap,
        "norm_eps": getattr(vit.norm, "eps", None),
        **vit.data,
        "features": "the tokens after the final norm; prefix tokens first",
        **facts,
    }


def facts_text(facts: dict[str, Any]) -> str:
    """The text of `backbone.json`."""
    return json.dumps(facts, indent=2, allow_nan=False) + "\n"


def write_backbone(folder: Path, weights: dict[str, Tensor], text: str) -> None:
    """Write a backbone's weights by timm's keys, without its head, and the text of its `backbone.json`.

    `backbone.safetensors` holds the text too: `is_written` tells whether a kill left one file without the other.
    """
    weights = {key: value for key, value in weights.items() if not key.startswith(("head.", "head_dist."))}
    weights = {key: value.detach().contiguous().float() for key, value in weights.items()}
    write_tensors(folder / "backbone.safetensors", weights, facts=text)
    write_atomically(folder / "backbone.json", lambda file: file.write(text.encode()))


def is_written(folder: Path, text: str) -> bool:
    """Whether both files of a backbone are there, with this text."""
    facts = folder / "backbone.json"
    same = facts.exists() and facts.read_text() == text
    return same and embedded_facts(folder / "backbone.safetensors") == text
