"""The CLIP model that an image tower comes from: its text tower and projections by open_clip's names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastalign.backbones.layouts import HF_CLIP, OPEN_CLIP, from_timm, to_timm
from fastalign.backbones.weight_files import locate, plain, read_json, read_weights
from fastalign.backbones.weights import STATES, interpret
from fastalign.utils.errors import UserError, first_line

HUB = "hf-hub:"
_OPEN_CLIP_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_DOWNLOADED = ["*.json", "*.txt", "*.model", "*.safetensors"]
_TOKENIZER = ("tokenizer", "special_tokens", "vocab", "merges", "spiece", "added_tokens")
"""How the names of a tokenizer's files begin."""
NO_TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
"""The smallest text tower, for an export of the visual tower alone: open_clip builds no model without one."""
_HF_TEXT = HF_CLIP._replace(
    root={
        "pos_embed": "text_model.embeddings.position_embedding.weight",
        "token_embedding.": "text_model.embeddings.token_embedding.",
        "ln_final.": "text_model.final_layer_norm.",
    },
    blocks="text_model.encoder.layers",
    unread=("text_model.embeddings.position_ids", "text_model.head."),
)


class TextTower(NamedTuple):
    """The rest of a CLIP model."""

    place: str
    config: dict[str, Any]
    """open_clip's `model_cfg`; without `vision_cfg` if it is not a model of open_clip"""
    state: dict[str, Tensor]
    """of the whole model by open_clip's names, as far as it is known"""
    tokenizer: list[Path]
    """files of its tokenizer; empty = open_clip has it"""


def read_text_tower(place: str) -> TextTower:
    """The text tower of an open_clip or transformers CLIP or SigLIP.

    Args:
        place: a file or a folder of weights, or ``hf-hub:OWNER/NAME``.

    Raises:
        UserError: it cannot be read, or has no text tower.
    """
    folder = _download(place.removeprefix(HUB)) if place.startswith(HUB) else Path(place)
    path = next((folder / name for name in _OPEN_CLIP_NAMES if (folder / name).is_file()), None) or locate(
        folder
    )
    content = read_weights(path)
    state = next((content[key] for key in STATES if isinstance(content.get(key), dict)), content)
    state = {plain(key): value for key, value in state.items() if isinstance(value, Tensor)}
    config, settings = {"text_cfg": NO_TEXT}, path.with_name("open_clip_config.json")
    try:
        if "text_model.final_layer_norm.weight" in state:
            config, state = _from_transformers(path, state)
        elif settings.is_file():
            config = {"quick_gelu": False, **read_json(settings)["model_cfg"]}
        elif "text_projection" in state:
            config = _measured(state)
        own_tokenizer = config["text_cfg"].get("hf_tokenizer_name")
    except (KeyError, ValueError, OSError) as error:
        raise UserError(
            f"{place}: its text tower cannot be read ({type(error).__name__}: {first_line(error)})"
        ) from error
    if config["text_cfg"] == NO_TEXT:
        raise UserError(f"{place} has no text tower that open_clip can build")
    files = [file for file in path.parent.iterdir() if file.name.startswith(_TOKENIZER)]
    return TextTower(place, config, state, files if own_tokenizer else [])


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=_DOWNLOADED))
    except Exception as error:  # the package, the network, the name: no common class
        raise UserError(
            f"{HUB}{name} cannot be loaded ({first_line(error)}): check the network and the name"
        ) from error


def _measured(state: dict[str, Tensor]) -> dict[str, Any]:
    """The configuration of an open_clip CLIP, read from shapes; heads of 64 channels, as all of its models have."""
    width, embed_dim = state["text_projection"].shape
    layers = {key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")}
    text = {"width": width, "heads": width // 64, "layers": len(layers)}
    text["context_length"] = len(state["positional_embedding"])
    text["vocab_size"] = len(state["token_embedding.weight"])
    return {"embed_dim": embed_dim, "text_cfg": text}


def _from_transformers(path: Path, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights by open_clip's names."""
    from transformers import AutoConfig

    if not path.with_name("config.json").is_file():
        raise UserError(f"{path}: its text tower needs the config.json next to it: give the whole folder")
    text = AutoConfig.from_pretrained(path.parent).text_config
    names = {key: value for key, value in state.items() if key.startswith("text_model.")}
    tower = from_timm(to_timm(names, _HF_TEXT), OPEN_CLIP)
    scales = {key: state[key] for key in ("logit_scale", "logit_bias") if key in state}
    config = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": text.intermediate_size / text.hidden_size,
        "norm_kwargs": {"eps": text.layer_norm_eps},
    }
    build: Callable = _siglip if "logit_bias" in scales else _clip
    return build(path, text.hidden_act, state, config, tower | scales)


def _clip(path: Path, activation: str, state: dict, text: dict, tower: dict) -> tuple[dict, dict]:
    projection = state["text_projection.weight"]
    tower |= {"text_projection": projection.T, "visual.proj": state["visual_projection.weight"].T}
    return {"embed_dim": len(projection), "quick_gelu": activation == "quick_gelu", "text_cfg": text}, tower


def _siglip(path: Path, activation: str, state: dict, text: dict, tower: dict) -> tuple[dict, dict]:
    text |= {
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "hf_tokenizer_name": "this folder",
    }
    text |= {"tokenizer_kwargs": {"clean": "canonicalize"}}
    if activation == "gelu_pytorch_tanh":
        text["act_kwargs"] = {"approximate": "tanh"}
    projection = {f"text_projection.{kind}": state[f"text_model.head.{kind}"] for kind in ("weight", "bias")}
    scales = {key: tower.pop(key) for key in ("logit_scale", "logit_bias")}
    tower = {f"text.{key}": value for key, value in (tower | projection).items()} | scales
    pool = interpret(state, str(path)).state
    tower |= {f"visual.trunk.{key}": value for key, value in pool.items() if key.startswith("attn_pool.")}
    width = len(projection["text_projection.weight"])
    return {"embed_dim": width, "init_logit_bias": -10, "custom_text": True, "text_cfg": text}, tower
