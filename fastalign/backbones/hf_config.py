"""What transformers' config.json says of the weights next to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastalign.backbones.layouts import HF_ACTIVATIONS
from fastalign.backbones.spec import ViTSpec
from fastalign.backbones.weight_files import read_json
from fastalign.utils.errors import UserError

HF_DEFAULTS = {
    kind: {"hidden_act": activation, "num_attention_heads": heads}
    for activation, heads, kinds in (
        ("quick_gelu", 12, ["clip_vision_model"]),
        ("gelu_pytorch_tanh", 12, ["siglip_vision_model", "siglip2_vision_model"]),
        ("gelu", 12, ["vit", "dinov2", "dinov2_with_registers"]),
        ("gelu", 6, ["dinov3_vit"]),
        ("gelu", 16, ["internvl_vision"]),
        ("silu", 8, ["aimv2_vision_model"]),
    )
    for kind in kinds
}
"""By model type: transformers' defaults of keys that a config.json may omit, as google/siglip-base's does."""


def vision_config(path: Path) -> dict[str, Any]:
    """The vision model in transformers' config.json, with transformers' defaults."""
    config = read_json(path) if path.is_file() else {}
    config = config if isinstance(config, dict) and "model_type" in config else {}
    vision = config.get("vision_config", config)
    if not isinstance(vision, dict):
        return {}
    kind = vision.get("model_type", f"{config.get('model_type')}_vision_model")
    return HF_DEFAULTS.get(kind, {}) | vision


def recorded_grid(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Patches along height and width of transformers' position tables; SigLIP 2 records no image size."""
    sizes = [config.get(key) for key in ("image_size", "patch_size")]
    sizes = [[size, size] if isinstance(size, int) else size for size in sizes]
    if not all(isinstance(size, list) and len(size) == 2 for size in sizes):
        return None
    return sizes[0][0] // sizes[1][0], sizes[0][1] // sizes[1][1]


def check_config(spec: ViTSpec, config: Mapping[str, Any], path: str) -> None:
    """Compare a backbone with what transformers' config.json says and weights do not show."""
    block = spec.block
    for key, ours, argument in (
        ("num_attention_heads", block.heads, "num_heads"),
        ("hidden_act", HF_ACTIVATIONS[block.activation], "act_layer"),
    ):
        if (theirs := config.get(key, ours)) != ours:
            timms = {name: timm for timm, name in HF_ACTIVATIONS.items()}.get(theirs, theirs)
            raise UserError(
                f"{path}: its config.json has {key}={theirs}, the backbone has {ours}: give the right name, "
                f"or the argument {argument}={timms}"
            )
