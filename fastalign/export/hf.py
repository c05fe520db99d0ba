"""Files for transformers, and towers that load without `trust_remote_code`.

Importing this module registers capped exports, and VLMs saved with one, with transformers' auto classes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from fastalign.backbones.layouts import HF_ACTIVATIONS, HF_CLIP, HF_DINOV2, HF_DINOV3, from_timm
from fastalign.backbones.vit import ViT
from fastalign.backbones.weight_files import read_json
from fastalign.export.modeling_fastalign import TOWERS
from fastalign.export.run import Run
from fastalign.utils.errors import UserError

MODELING = "modeling_fastalign"  # the module that travels with an export
Content = tuple[dict[str, Any], dict[str, Tensor]]
"""Configuration values besides the common ones, and weights by the names that files use."""


def load_tower(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tower of an ``hf-*`` export, with or without a cap; UserError for another folder.

    Its `hidden_states[-1]` are fastalign's features, cap and norm included.
    """
    path = Path(folder) / "config.json"
    kind = read_json(path).get("model_type") if path.is_file() else None
    if kind not in TOWERS:
        raise UserError(f"{path}: the model type is {kind}: give the folder of an export --to hf-*")
    return TOWERS[kind].from_pretrained(folder, dtype=dtype)


def _clip(vit: ViT) -> Content:
    settings = {"intermediate_size": vit.spec.block.mlp_hidden, "projection_dim": vit.embed_dim}
    # Files have this prefix in all versions of transformers.
    weights = from_timm(vit.state_dict(), HF_CLIP)
    return settings, {f"vision_model.{key}": value for key, value in weights.items()}


def _siglip(vit: ViT) -> Content:
    return {"intermediate_size": vit.spec.block.mlp_hidden, "vision_use_head": False}, _clip(vit)[1]


@torch.no_grad()
def _dinov2(vit: ViT) -> Content:
    """The prefix tokens include their positions; without LayerScale its factors are 1."""
    settings = {"mlp_ratio": vit.spec.block.mlp_hidden // vit.embed_dim}
    prefix, patches = vit.prefix_rows(), vit.patch_position()
    ones = torch.ones(vit.embed_dim)
    weights = {f"blocks.{i}.ls{number}.gamma": ones for i in range(len(vit.blocks)) for number in (1, 2)}
    weights |= {key: value for key, value in vit.state_dict().items() if key != "reg_token"}
    weights["cls_token"] = prefix[None, :1]
    weights["pos_embed"] = torch.cat([torch.zeros_like(patches[:1]), patches])[None]
    weights["mask_token"] = torch.zeros(1, vit.embed_dim)
    if vit.spec.registers:
        settings["num_register_tokens"] = vit.spec.registers
        weights["register_tokens"] = prefix[None, 1:]
    return settings, from_timm(weights, HF_DINOV2)


def _dinov3(vit: ViT) -> Content:
    block = vit.spec.block
    bias = block.qkv_bias or block.qkv == "no_k_bias"
    settings = {
        "intermediate_size": block.mlp_hidden,
        "use_gated_mlp": block.mlp == "swiglu",
        "query_bias": bias,
        "key_bias": bias and block.qkv == "fused",
        "value_bias": bias,
        "num_register_tokens": vit.spec.registers,
        "pos_embed_rescale": None,  # augments coordinates in training mode, which alignment does not
    }
    mask_token = {"embeddings.mask_token": torch.zeros(1, 1, vit.embed_dim)}
    return settings, from_timm(vit.state_dict(), HF_DINOV3) | mask_token


CONTENT = {"clip": _clip, "siglip": _siglip, "dinov2": _dinov2, "dinov3": _dinov3}


def files(run: Run, folder: Path, target: str) -> dict[str, Any]:
    """A folder for `from_pretrained`, with the tower of a target ``hf-NAME``."""
    vit, block, name = run.vit, run.vit.spec.block, target.removeprefix("hf-")
    settings, weights = CONTENT[name](vit)
    kind = f"{name}_with_registers" if name == "dinov2" and vit.spec.registers else name
    model = TOWERS[f"fastalign_{kind}"]
    config = model.config_class(
        architectures=[model.__name__],
        auto_map={"AutoModel": f"{MODELING}.{model.__name__}"},
        dtype="float32",
        softcap=vit.softcap,
        final_norm_eps=vit.norm.eps,
        hidden_size=block.width,
        num_hidden_layers=vit.spec.depth,
        num_attention_heads=block.heads,
        image_size=vit.spec.image_size[0],
        patch_size=vit.spec.patch_size[0],
        num_channels=vit.spec.channels,
        hidden_act=HF_ACTIVATIONS[block.activation],
        layer_norm_eps=block.norm_eps,
        **settings,
    )
    config.save_pretrained(folder)  # and the module that defines it
    written = json.loads((folder / "config.json").read_text())
    if vit.softcap is None:  # transformers' own class computes the same features
        stock = model.__bases__[1]
        written |= {"model_type": stock.config_class.model_type, "architectures": [stock.__name__]}
    processor = _processor(vit)
    return {"config.json": written, "model.safetensors": weights, "preprocessor_config.json": processor}


def _processor(vit: ViT) -> dict[str, Any]:
    """The backbone's evaluation transform, for the module's image processor, and for transformers' own of CLIP."""
    height, width = vit.spec.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "auto_map": {"AutoImageProcessor": f"{MODELING}.AlignedImageProcessor"},
        "do_resize": True,
        "size": {"shortest_edge": int(height / vit.data["crop_pct"])},
        "resample": Image.Resampling[vit.data["interpolation"].upper()].value,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": vit.data["mean"],
        "image_std": vit.data["std"],
        "do_convert_rgb": True,
    }


def read(folder: Path) -> Callable[[Tensor], Tensor]:
    """The tower as `AutoModel` loads it with `trust_remote_code`, from this package's copy of the module."""
    logging.disable_progress_bar()
    model = load_tower(folder).eval()
    return lambda images: model(images).last_hidden_state
