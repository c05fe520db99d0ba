"""Files for transformers: weights, configuration and `modeling_fastalign.py`, which adds the soft-cap and norm."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.backbones.layouts import HF_ACTIVATIONS, HF_CLIP, HF_DINOV2, HF_DINOV3, Layout, from_timm
from fastalign.backbones.vit import ViT
from fastalign.export.run import Run
from fastalign.utils.files import write_tensors

MODELING = "modeling_fastalign"
"""The module that travels with an export."""
HOW_CAPPED = (
    f"{MODELING}.py in this folder caps: load with `trust_remote_code=True`, transformers 5.20 or newer."
)
Tokens = Callable[[Tensor], Tensor]
"""From images to our features: all tokens, prefix first."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a configuration."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def convert(state: dict[str, Tensor], layout: Layout, prefix: str = "") -> dict[str, Tensor]:
    """Weights with timm's keys by the names of a layout, each with memory of its own."""
    return {
        prefix + key: value.clone(memory_format=torch.contiguous_format)
        for key, value in from_timm(state, layout).items()
    }


def _clip_state(vit: ViT) -> dict[str, Tensor]:
    # The prefix is the one that files have in all versions of transformers.
    return convert(vit.state_dict(), HF_CLIP, "vision_model.")


@torch.no_grad()
def _dinov2_state(vit: ViT) -> dict[str, Tensor]:
    """The positions of the prefix go into its tokens; without LayerScale its factors are one."""
    prefix, patches = vit.prefix_rows(), vit.patch_position()
    ones = torch.ones(vit.embed_dim)
    state = {f"blocks.{i}.ls{number}.gamma": ones for i in range(len(vit.blocks)) for number in (1, 2)}
    state |= {key: value for key, value in vit.state_dict().items() if key != "reg_token"} | {
        "cls_token": prefix[None, :1],
        "pos_embed": torch.cat([torch.zeros_like(patches[:1]), patches])[None],
        "mask_token": torch.zeros(1, vit.embed_dim),
    }
    if vit.spec.registers:
        state["register_tokens"] = prefix[None, 1:]
    return convert(state, HF_DINOV2)


def _dinov3_state(vit: ViT) -> dict[str, Tensor]:
    return convert(vit.state_dict(), HF_DINOV3) | {"embeddings.mask_token": torch.zeros(1, 1, vit.embed_dim)}


def _dinov3_settings(vit: ViT) -> dict[str, Any]:
    block = vit.spec.block
    bias = block.qkv_bias or block.qkv == "no_k_bias"
    return {
        "intermediate_size": block.mlp_hidden,
        "use_gated_mlp": block.mlp == "swiglu",
        "query_bias": bias,
        "key_bias": bias and block.qkv == "fused",
        "value_bias": bias,
        "num_register_tokens": vit.spec.registers,
        "pos_embed_rescale": None,  # augments coordinates in training mode, which alignment does not
    }


class Tower(NamedTuple):
    """A family of transformers' vision towers."""

    wanted: dict[str, Any]
    """the fields of `ViTSpec` that it can express; a tuple has alternatives"""
    class_name: str
    settings: Callable[[ViT], dict[str, Any]]
    """of its configuration, besides the common ones"""
    state: Callable[[ViT], dict[str, Tensor]]
    """the weights by their names in files"""

    def _class_name(self, vit: ViT) -> str:
        if self.class_name == "Dinov2Model" and vit.spec.registers:
            return "Dinov2WithRegistersModel"
        return self.class_name

    def write(self, run: Run, folder: Path) -> None:
        """Write a folder for `from_pretrained`."""
        import transformers

        from fastalign.export import modeling_fastalign

        vit, block = run.vit, run.vit.spec.block
        stock = getattr(transformers, self._class_name(vit))
        model = modeling_fastalign.TOWERS[stock.config_class.model_type]
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
            **self.settings(vit),
        )
        config.save_pretrained(folder)  # and the module that defines it
        written = json.loads((folder / "config.json").read_text())
        if vit.softcap is None:  # transformers' own class computes the same features
            written |= {"model_type": stock.config_class.model_type, "architectures": [stock.__name__]}
        write_json(folder / "config.json", {"how_to_load": _how_to_load(vit)} | written)
        write_tensors(folder / "model.safetensors", self.state(vit))
        write_json(folder / "preprocessor_config.json", _processor(vit))

    def usage(self, run: Run) -> str:
        """Lines of Python for the model card."""
        lines = [
            "from transformers import AutoModel",
            "",
            'tower = AutoModel.from_pretrained("FOLDER", trust_remote_code=True).eval()',
            "tokens = tower(images).last_hidden_state  # prefix tokens first; hidden_states[-1] is the same",
        ]
        if run.vit.softcap is None:
            name, last = self._class_name(run.vit), "tower(images).last_hidden_state"
            lines += [
                "",
                f"# Without trust_remote_code, and with hidden_states that are not normed: {name}",
                f'# tower = {name}.from_pretrained("FOLDER").eval()',
                f"# tokens = {f'tower.post_layernorm({last})' if name.startswith('CLIP') else last}",
            ]
        lines += [
            "",
            "# Pixels of a PIL image, by transformers' AutoImageProcessor:",
            '# processor = AutoImageProcessor.from_pretrained("FOLDER", trust_remote_code=True)',
            '# images = processor(picture, return_tensors="pt")["pixel_values"]',
            "# LLaVA; saved, it loads with AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True):",
            "# llava = LlavaForConditionalGeneration(tower.config.llava_config(text_config))",
            "# llava.model.vision_tower = tower",
        ]
        return "\n".join(lines)


_PLAIN = {
    "channels": 3,
    "position": True,
    "relative_position": False,
    "rotary": False,
    "patch_norm": False,
    "final_norm": True,
    "block.mlp": "mlp",
    "distilled": False,
    "block.mlp_norm": False,
    "block.proj_bias": True,
    "block.post_norm": False,
    "block.qkv": "fused",
    "block.qkv_bias": True,
    "block.qk_norm": False,
    "block.attention_norm": False,
    "block.norm": "layer_norm",
}
_NO_SCALE = _PLAIN | {"registers": 0, "block.layer_scale": None}
CLIP = Tower(
    _NO_SCALE | {"class_token": True, "position_prefix": True, "pre_norm": True, "patch_bias": False},
    "CLIPVisionModel",
    lambda vit: {"intermediate_size": vit.spec.block.mlp_hidden, "projection_dim": vit.embed_dim},
    _clip_state,
)
SIGLIP = Tower(
    _NO_SCALE | {"class_token": False, "pre_norm": False, "patch_bias": True},
    "SiglipVisionModel",
    lambda vit: {"intermediate_size": vit.spec.block.mlp_hidden, "vision_use_head": False},
    _clip_state,
)
DINOV2 = Tower(
    _PLAIN | {"class_token": True, "pre_norm": False, "patch_bias": True},
    "Dinov2Model",
    lambda vit: {
        "mlp_ratio": vit.spec.block.mlp_hidden // vit.embed_dim,
        **({"num_register_tokens": vit.spec.registers} if vit.spec.registers else {}),
    },
    _dinov2_state,
)

DINOV3 = Tower(
    _PLAIN
    | {
        "class_token": True,
        "position": False,
        "pre_norm": False,
        "patch_bias": True,
        "rotary": True,
        "rotary_mixed": False,
        "block.rotate_half": True,
        "block.layer_scale_keys": "gamma",
        "block.qkv": ("fused", "no_k_bias"),
        "block.qkv_bias": (True, False),
        "block.mlp": ("mlp", "swiglu"),
    },
    "DINOv3ViTModel",
    _dinov3_settings,
    _dinov3_state,
)
TOWERS = {"clip": CLIP, "siglip": SIGLIP, "dinov2": DINOV2, "dinov3": DINOV3}


def read(folder: Path) -> Tokens:
    """Load the tower as `AutoModel` does with `trust_remote_code`, from this package's copy of the module."""
    from transformers.utils import logging

    from fastalign.export import hf

    logging.disable_progress_bar()
    model = hf.load_tower(folder).eval()
    return lambda images: model(images).last_hidden_state


def _how_to_load(vit: ViT) -> str:
    """For people who open config.json."""
    loader = "transformers (5.20 or newer): AutoModel.from_pretrained(FOLDER, trust_remote_code=True)"
    if vit.softcap is None:
        return f"{loader}, which norms all outputs; without trust_remote_code transformers' own class"
    return (
        f"{loader}; {MODELING}.py caps the attention logits at {vit.softcap:g}; transformers' own classes do not, "
        "which changes the features"
    )


def _processor(vit: ViT) -> dict[str, Any]:
    """The backbone's evaluation transform, for the module's image processor, and for transformers' own of CLIP."""
    height, width = vit.spec.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "auto_map": {"AutoImageProcessor": f"{MODELING}.AlignedImageProcessor"},
        "do_resize": True,
        "size": {"shortest_edge": int(height / vit.data["crop_pct"])},
        "resample": {"lanczos": 1, "bilinear": 2, "bicubic": 3}[vit.data["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": vit.data["mean"],
        "image_std": vit.data["std"],
        "do_convert_rgb": True,
    }


PROCESSOR_NOTE = (
    "Image processor: without trust_remote_code transformers uses its own, which resamples with torchvision and "
    "rounds the offset of the centre crop down: its crop may lie one pixel further left or up than in training."
)
