"""Files for open_clip: the whole CLIP model where its text tower is known, else the visual tower alone."""

import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from fastalign.backbones.layouts import OPEN_CLIP
from fastalign.backbones.saving import facts_text
from fastalign.backbones.vit import ViT
from fastalign.export.run import Run, misfits_of
from fastalign.export.text_tower import HUB, NO_TEXT, TextTower, read_text_tower
from fastalign.export.towers import CLIP, Tokens, convert, write_json
from fastalign.utils.errors import UserError, first_line
from fastalign.utils.files import write_tensors

ADD = "`--text-tower PLACE` adds it"


def _fits(vit: ViT) -> bool:
    """Whether open_clip's own vision transformer can express a backbone."""
    return not misfits_of(CLIP.wanted, vit.spec)


def misfits(run: Run) -> list[str]:
    """What of a backbone neither open_clip nor timm within it can express."""
    return [] if _fits(run.vit) else _timm_misfits(run)


def write(run: Run, folder: Path) -> list[str]:
    """Write a folder for ``open_clip.create_model_and_transforms("local-dir:FOLDER")``."""
    vit, (text, reason) = run.vit, _text_tower(run)
    config = dict(text.config) if text else {"embed_dim": vit.embed_dim, "text_cfg": NO_TEXT}
    native = _fits(vit) and "timm_model_name" not in config.get("vision_cfg", {})
    known = text.state if text else {}
    if native:
        vision, quick = _vision(vit), vit.spec.block.activation == "quick_gelu"
        if config.setdefault("quick_gelu", quick) != quick:
            raise UserError(
                f"--to open-clip: the text tower of {text.place} has another activation than the backbone"
            )
        state = convert(vit.state_dict(), OPEN_CLIP, "visual.")
        known = {"visual.proj": torch.eye(vit.embed_dim)} | known
    else:
        vision = _timm_vision(run, config.get("vision_cfg", {}), known)
        state = {f"visual.trunk.{key}": value for key, value in vit.state_dict().items()}
    config = {**config, "vision_cfg": vision}
    state = {**({} if text else _zeros(config)), **known, **state}
    preprocess = {key: vit.data[key] for key in ("mean", "std", "interpolation")}
    write_json(
        folder / "open_clip_config.json",
        {"model_cfg": config, "preprocess_cfg": {**preprocess, "resize_mode": "shortest"}},
    )
    state = {key: value.detach().float().contiguous().clone() for key, value in state.items()}
    write_tensors(folder / "open_clip_model.safetensors", state, facts=facts_text(_facts(run)))
    for file in text.tokenizer if text else []:
        shutil.copy(file, folder)
    return [*_crop_note(vit), _text_note(text, reason)]


def _text_tower(run: Run) -> tuple[TextTower | None, str]:
    """What was asked for, else the text tower of the weights that the backbone started from; or why there is none."""
    if run.text_tower is not None:
        return read_text_tower(run.text_tower), ""
    place, page = run.weights, run.source()["page"] or ""
    if place == "pretrained":
        place = HUB + page.removeprefix("https://huggingface.co/")
    if place in (None, "random"):
        return None, "the weights that the backbone started from are not known"
    try:
        return read_text_tower(place), ""
    except UserError as error:
        return None, str(error)


def _text_note(text: TextTower | None, reason: str) -> str:
    if text is None:
        return f"There is only the visual tower, `encode_text` gives zeros ({reason}); {ADD}."
    return (
        f"The text tower and the projections are those of {Path(text.place).name}, unchanged. Alignment trained "
        "neither them nor the pooled output, and its final norm is new: measure zero-shot accuracy before use."
    )


def _crop_note(vit: ViT) -> list[str]:
    if vit.data["crop_pct"] == 1:
        return []
    share = f"{vit.data['crop_pct']:g}"
    return [
        f"open_clip's transform keeps the whole centre square; training and evaluation cropped it to {share}."
    ]


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


def _timm_vision(run: Run, source: dict[str, Any], known: dict[str, Tensor]) -> dict[str, Any]:
    """A timm model within open_clip."""
    if problems := _timm_misfits(run):
        raise UserError(f"--to open-clip: {problems[0]}; choose --to timm")
    pool = "map" if any(key.startswith("visual.trunk.attn_pool.") for key in known) else ""
    own = {"timm_model_name": run.facts["name"].split(".")[0], "timm_model_pretrained": False}
    return {
        "timm_pool": pool,
        "timm_proj": "none",
        **source,
        **own,
        "image_size": list(run.vit.spec.image_size),
    }


def _timm_misfits(run: Run) -> list[str]:
    """open_clip builds timm's models by name alone."""
    name, free = run.facts["name"].split(".")[0], ("num_classes", "drop_path_rate", "global_pool")
    if not timm.is_model(name):
        return [f"{name} is not a model of timm"]
    given = {key: value for key, value in run.facts["kwargs"].items() if key not in free}
    known = timm.get_pretrained_cfg(name)
    if known is not None and known.input_size[1:] == run.vit.spec.image_size:
        given.pop("img_size", None)
    return [f"open_clip builds timm's {name} without arguments, not with {given}"] if given else []


def _zeros(config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a text tower that says nothing."""
    import open_clip

    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    return {
        key: torch.zeros(v.shape) for key, v in model.state_dict().items() if not key.startswith("visual.")
    }


def _facts(run: Run) -> dict[str, Any]:
    """What `student.weights` must know of the folder: a student has no attention pooling and a norm of its own."""
    return {
        "name": run.facts["name"],
        "kwargs": run.facts["kwargs"],
        "softcap": None,
        "norm_eps": run.facts.get("norm_eps"),
    }


def read(folder: Path) -> Tokens:
    """Load the folder as a user does."""
    import open_clip

    try:
        visual = open_clip.create_model(f"local-dir:{folder}").eval().visual
    except (RuntimeError, TypeError) as error:
        raise UserError(f"--to open-clip: open_clip cannot load the model ({first_line(error)})") from error

    def tokens(images: Tensor) -> Tensor:
        out = visual.forward_intermediates(images, **_LAST)
        parts = ("image_intermediates_prefix", "image_intermediates")
        return torch.cat([out[part][-1] for part in parts if part in out], 1)

    return tokens


_LAST = {
    "indices": 1, "normalize_intermediates": True, "intermediates_only": True, "output_fmt": "NLC",
    "output_extra_tokens": True,
}  # fmt: skip
"""Arguments for the normed tokens of the last layer."""


def usage(run: Run) -> str:
    """Lines of Python for the model card."""
    options = ", ".join(f"{key}={value!r}" for key, value in _LAST.items())
    tokens = 'out["image_intermediates"][-1]'
    if run.vit.spec.prefix:
        tokens = f'torch.cat([out["image_intermediates_prefix"][-1], {tokens}], 1)  # prefix tokens first'
    return (
        "import open_clip, torch\n\n"
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")\n'
        f"out = model.eval().visual.forward_intermediates(\n    images, {options}\n)\n"
        f"tokens = {tokens}"
    )
