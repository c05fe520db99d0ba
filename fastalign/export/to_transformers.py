"""Files for transformers: weights, configuration and `modeling_fastalign.py`, which adds the soft-cap and norm."""

import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastalign.backbones.layouts import HF_ACTIVATIONS, HF_CLIP, HF_DINOV2, HF_DINOV3, from_timm
from fastalign.backbones.spec import BlockSpec, ViTSpec
from fastalign.backbones.vit import ViT
from fastalign.export.files import write_json, write_weights
from fastalign.export.run import Run

MODELING = "modeling_fastalign"  # the module that travels with an export
Content = tuple[dict[str, Any], dict[str, Tensor]]
"""Settings of a configuration besides the common ones, and weights by their names in files."""
HOW_CAPPED = (
    f"{MODELING}.py in this folder caps: load with `trust_remote_code=True`, transformers 5.20 or newer."
)
PROCESSOR_NOTE = (
    "Image processor: without trust_remote_code transformers uses its own, which resamples with torchvision and "
    "rounds the offset of the centre crop down: its crop may lie one pixel further left or up than in training."
)


def misfits_of(wanted: dict[str, Any], run: Run) -> list[str]:
    """What of a backbone a library cannot express that needs the `wanted` fields; empty = the backbone fits.

    The fields are those of `ViTSpec` and `BlockSpec`; a tuple has alternatives.
    """
    spec, found = run.vit.spec, []
    have = asdict(spec) | asdict(spec.block)
    for name, value in wanted.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if have[name] not in allowed:
            found.append(f"{name} is {have[name]}, wanted {' or '.join(map(str, allowed))}")
    if any(len({*size}) > 1 for size in (spec.grid, spec.image_size, spec.patch_size)):
        found.append(f"images of {spec.image_size[0]}x{spec.image_size[1]}, wanted square ones")
    return found


_ANY = {
    "activation", "norm_eps", "softcap", "fresh_norm_eps", "position_fixed", "position_prefix", "pooled_norm", "pool",
    "pool_prefix",
}  # fmt: skip
"""Fields that the towers express, or that do not change the tokens."""
_PLAIN = {
    field.name: field.default
    for kind in (ViTSpec, BlockSpec)
    for field in fields(kind)
    if field.name not in _ANY and field.default is not MISSING
}


_DINO = {name: value for name, value in _PLAIN.items() if name not in ("registers", "layer_scale")}
WANTED = {
    "clip": _PLAIN | {"pre_norm": True, "patch_bias": False, "position_prefix": True},
    "siglip": _PLAIN | {"class_token": False},
    "dinov2": _DINO,
    "dinov3": _DINO
    | {
        "position": False,
        "rotary": True,
        "rotate_half": True,
        "layer_scale_keys": "gamma",
        "qkv": ("fused", "no_k_bias"),
        "qkv_bias": (True, False),
        "mlp": ("mlp", "swiglu"),
    },
}
"""By the name of a tower: what `misfits_of` compares with a backbone."""


def _clip(vit: ViT) -> Content:
    settings = {"intermediate_size": vit.spec.block.mlp_hidden, "projection_dim": vit.embed_dim}
    # The prefix is the one that files have in all versions of transformers.
    weights = from_timm(vit.state_dict(), HF_CLIP)
    return settings, {f"vision_model.{key}": value for key, value in weights.items()}


def _siglip(vit: ViT) -> Content:
    return {"intermediate_size": vit.spec.block.mlp_hidden, "vision_use_head": False}, _clip(vit)[1]


@torch.no_grad()
def _dinov2(vit: ViT) -> Content:
    """The positions of the prefix go into its tokens; without LayerScale its factors are one."""
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


def write(name: str, run: Run, folder: Path) -> list[str]:
    """Write a folder for `from_pretrained`, with the tower of a name."""
    from fastalign.export import modeling_fastalign

    vit, block = run.vit, run.vit.spec.block
    settings, weights = CONTENT[name](vit)
    kind = f"{name}_with_registers" if name == "dinov2" and vit.spec.registers else name
    model = modeling_fastalign.TOWERS[f"fastalign_{kind}"]
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
    loader = "transformers (5.20 or newer): AutoModel.from_pretrained(FOLDER, trust_remote_code=True)"
    if vit.softcap is None:  # transformers' own class computes the same features
        stock = model.__bases__[1]
        written |= {"model_type": stock.config_class.model_type, "architectures": [stock.__name__]}
        loader += ", which norms all outputs; without trust_remote_code transformers' own class"
    else:
        loader += (
            f"; {MODELING}.py caps the attention logits at {vit.softcap:g}; transformers' own classes do not, which "
            "changes the features"
        )
    write_json(folder / "config.json", {"how_to_load": loader} | written)
    write_weights(folder / "model.safetensors", weights)
    write_json(folder / "preprocessor_config.json", _processor(vit))
    return [PROCESSOR_NOTE]


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
    """Load the tower as `AutoModel` does with `trust_remote_code`, from this package's copy of the module."""
    from transformers.utils import logging

    from fastalign.export.hf import load_tower

    logging.disable_progress_bar()
    model = load_tower(folder).eval()
    return lambda images: model(images).last_hidden_state
