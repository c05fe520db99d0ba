"""An aligned backbone as a run saves it: `backbone.safetensors` and `backbone.json`."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastalign.backbones.vit import ViT
from fastalign.backbones.weight_files import embedded_facts
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_atomically, write_tensors


def save_backbone(student: nn.Module, folder: str | Path, **facts: Any) -> None:
    """Save the backbone of a student, without its head and decoder, as a run does: every command reads the folder.

    With several ranks, call it on one of them with full, not sharded, tensors.

    Args:
        student: a student of fastalign or a `ViT`, perhaps wrapped in DDP or torch.compile. Weights are written in
            fp32, with soft-cap, preprocessing and timm name.
        folder: where to write; created if missing. Earlier files there are replaced.
        **facts: JSON values to record too, such as `step`, `val_loss`, or `weights`: "pretrained" or the file that
            the student started from, which an export needs to name the licence.

    Raises:
        UserError: another kind of module, or a backbone whose timm name is not known.
    """
    student = getattr(student, "module", student)
    vit = getattr(student, "encoder", student)
    vit = getattr(vit, "_orig_mod", vit)
    if not isinstance(vit, ViT):
        raise UserError(f"save_backbone: got {type(vit).__name__}; give a student or a fastalign backbone")
    if taken := facts.keys() & {"name", "kwargs", "softcap", "norm_eps"}:
        raise UserError(
            f"save_backbone: {min(taken)} is recorded of the student: name your own value otherwise"
        )
    write_backbone(Path(folder), vit.state_dict(), facts_text(backbone_facts(vit, **facts)))


def backbone_facts(vit: ViT, **facts: Any) -> dict[str, Any]:
    """The content of `backbone.json`: what a user of the backbone must know, and `facts`."""
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
    softcap = str(json.loads(text)["softcap"])
    write_tensors(folder / "backbone.safetensors", weights, softcap=softcap, facts=text)
    write_atomically(folder / "backbone.json", lambda file: file.write(text.encode()))


def is_written(folder: Path, text: str) -> bool:
    """Whether both files of a backbone are there, with this text."""
    facts = folder / "backbone.json"
    same = facts.exists() and facts.read_text() == text
    return same and embedded_facts(folder / "backbone.safetensors") == text
