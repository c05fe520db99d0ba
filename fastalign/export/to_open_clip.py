"""Files for open_clip: the whole CLIP model where its text tower is known, else the visual tower alone."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from fastalign.backbones.layouts import OPEN_CLIP, from_timm
from fastalign.backbones.moco import MOCO
from fastalign.backbones.vit import ViT
from fastalign.backbones.weight_files import facts_text, plain, read_json, read_weights
from fastalign.export.files import write_json, write_weights
from fastalign.export.run import Run
from fastalign.export.to_transformers import WANTED, misfits_of
from fastalign.utils.errors import UserError, first_line
from fastalign.utils.paths import user_path

HUB = "hf-hub:"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_DOWNLOADED = ["*.json", "*.txt", "*.model", "*.safetensors"]
_TOKENIZER = ("tokenizer", "special_tokens", "vocab", "merges", "spiece", "added_tokens")
"""How the names of a tokenizer's files begin."""
_NO_TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
"""The smallest text tower, for an export of the visual tower alone: open_clip builds no model without one."""


class TextTower(NamedTuple):
    """The rest of a CLIP model."""

    config: dict[str, Any]  # open_clip's `model_cfg`
    state: dict[str, Tensor]  # the weights of the whole model, as far as they are known
    tokenizer: list[Path]  # files of its tokenizer; empty = open_clip has it


def misfits(run: Run) -> list[str]:
    """What of a backbone neither open_clip nor timm within it can express."""
    return misfits_of(WANTED["clip"], run) and _timm_misfits(run)


def _timm_misfits(run: Run) -> list[str]:
    """open_clip builds timm's models by name alone."""
    name, free = run.facts["name"].split(".")[0], ("num_classes", "drop_path_rate", "global_pool")
    if name == MOCO or not timm.is_model(name):
        return [f"{name} is not a model of timm"]
    given = {key: value for key, value in run.facts["kwargs"].items() if key not in free}
    known = timm.get_pretrained_cfg(name)
    if known is not None and known.input_size[1:] == run.vit.spec.image_size:
        given.pop("img_size", None)
    return [f"open_clip builds timm's {name} without arguments, not with {given}"] if given else []


def write(run: Run, folder: Path) -> list[str]:
    """Write a folder for ``open_clip.create_model_and_transforms("local-dir:FOLDER")``."""
    vit, (text, note) = run.vit, _text_tower(run)
    config, weights = dict(text.config), text.state
    if "timm_model_name" in config.get("vision_cfg", {}) or misfits_of(WANTED["clip"], run):
        config["vision_cfg"] = _timm_vision(run, text)
        weights = weights | {f"visual.trunk.{key}": value for key, value in vit.state_dict().items()}
    else:
        quick = vit.spec.block.activation == "quick_gelu"
        if config.setdefault("quick_gelu", quick) != quick:
            raise UserError("--to open-clip: the text tower has another activation than the backbone")
        config["vision_cfg"] = _vision(vit)
        state = from_timm(vit.state_dict(), OPEN_CLIP)
        weights = {"visual.proj": torch.eye(vit.embed_dim)} | weights
        weights |= {f"visual.{key}": value for key, value in state.items()}
    preprocess = {key: vit.data[key] for key in ("mean", "std", "interpolation")}
    config = {"model_cfg": config, "preprocess_cfg": {**preprocess, "resize_mode": "shortest"}}
    write_json(folder / "open_clip_config.json", config)
    # For `student.weights`: a student has no attention pooling and a norm of its own.
    facts = run.facts | {"softcap": None}
    facts = {key: facts.get(key) for key in ("name", "kwargs", "softcap", "norm_eps")}
    write_weights(folder / "open_clip_model.safetensors", weights, facts=facts_text(facts))
    for file in text.tokenizer:
        shutil.copy(file, folder)
    if (share := vit.data["crop_pct"]) == 1:
        return [note]
    crop = f"the whole centre square; training and evaluation cropped it to {share:g}."
    return [f"open_clip's transform keeps {crop}", note]


def _text_tower(run: Run) -> tuple[TextTower, str]:
    """What was asked for, else that of the weights that the backbone started from, else none; a note for the user."""
    source = run.source()
    place = run.text_tower or source["weights"]
    if place == "pretrained":
        place = HUB + (source["page"] or "").removeprefix("https://huggingface.co/")
    reason = "the weights that the backbone started from are not known"
    if run.text_tower or place not in (None, "random"):
        try:
            return _read_text_tower(place), (
                f"The text tower and the projections are those of {Path(place).name}, unchanged. Alignment trained "
                "neither them nor the pooled output, and its final norm is new: measure zero-shot accuracy before "
                "use."
            )
        except UserError as error:
            if run.text_tower:
                raise
            reason = str(error)
    return _no_text_tower(run.vit.embed_dim), (
        f"There is only the visual tower, `encode_text` gives zeros ({reason}); `--text-tower PLACE` adds it."
    )


def _vision(vit: ViT) -> dict[str, Any]:
    """open_clip's own vision transformer."""
    block = vit.spec.block
    return {
        "layers": vit.spec.depth,
        "width": block.width,
        "head_width": block.width // block.heads,
        "mlp_ratio": block.mlp_hidden / block.width,
        "patch_size": vit.spec.patch_size[0],
        "image_size": vit.spec.image_size[0],
        "norm_kwargs": {"eps": block.norm_eps},
        "act_kwargs": {"approximate": "tanh"} if block.activation == "gelu_tanh" else None,
    }


def _timm_vision(run: Run, text: TextTower) -> dict[str, Any]:
    """A timm model within open_clip."""
    if problems := _timm_misfits(run):
        raise UserError(f"--to open-clip: {problems[0]}; choose --to timm")
    return {
        "timm_pool": "map" if any(key.startswith("visual.trunk.attn_pool.") for key in text.state) else "",
        "timm_proj": "none",
        **text.config.get("vision_cfg", {}),
        "timm_model_name": run.facts["name"].split(".")[0],
        "timm_model_pretrained": False,
        "image_size": list(run.vit.spec.image_size),
    }


def read(folder: Path) -> Callable[[Tensor], Tensor]:
    """Load the folder as a user does."""
    import open_clip

    visual = open_clip.create_model(f"local-dir:{folder}").eval().visual

    def tokens(images: Tensor) -> Tensor:
        out = visual.forward_intermediates(
            images,
            indices=1,  # the last layer's tokens alone
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        parts = ("image_intermediates_prefix", "image_intermediates")
        return torch.cat([out[part][-1] for part in parts if part in out], 1)

    return tokens


def _no_text_tower(embed_dim: int) -> TextTower:
    """A text tower that says nothing: its weights are zero."""
    import open_clip

    config = {"embed_dim": embed_dim, "text_cfg": _NO_TEXT}
    vision = {"layers": 1, "width": 64, "patch_size": 8, "image_size": 8}
    with torch.device("meta"):
        state = open_clip.CLIP(**config, vision_cfg=vision).state_dict()
    zeros = {key: torch.zeros(v.shape) for key, v in state.items() if not key.startswith("visual.")}
    return TextTower(config, zeros, [])


def _read_text_tower(place: str) -> TextTower:
    """That of a folder with weights and open_clip_config.json, a file of weights in it, or ``hf-hub:OWNER/NAME``."""
    folder = _download(place.removeprefix(HUB)) if place.startswith(HUB) else Path(user_path(place))
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), folder)
    settings = path.with_name("open_clip_config.json")
    if not path.is_file() or not settings.is_file():
        raise UserError(
            f"{place} has no text tower: open_clip_config.json and weights of open_clip are needed"
        )
    config, content = read_json(settings), read_weights(path)
    try:
        config = {"quick_gelu": False, **config["model_cfg"]}
        own_tokenizer = config["text_cfg"].get("hf_tokenizer_name")
        content = content.get("state_dict", content)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place}: its text tower cannot be read ({type(error).__name__}: {error}): copy it again"
        ) from error
    if config["text_cfg"] == _NO_TEXT:
        raise UserError(f"{place} has no text tower: give the model that it was exported with")
    state = {plain(key): value for key, value in content.items() if isinstance(value, Tensor)}
    files = [file for file in path.parent.iterdir() if file.name.startswith(_TOKENIZER)]
    return TextTower(config, state, files if own_tokenizer else [])


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=_DOWNLOADED))
    except Exception as error:  # the package, the network, the name: no common class
        raise UserError(
            f"{HUB}{name} cannot be loaded ({first_line(error)}): check the network and the name"
        ) from error
