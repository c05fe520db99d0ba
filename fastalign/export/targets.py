"""The libraries that a backbone can be exported to, and which backbones they support."""

from dataclasses import MISSING, asdict, fields
from importlib import import_module
from typing import Any, NamedTuple

from fastalign.backbones.spec import BlockSpec, ViTSpec
from fastalign.backbones.vit import ViT
from fastalign.utils.errors import UserError, first_line, unknown


class Target(NamedTuple):
    """A library's format."""

    package: str
    # In fastalign.export. `files` returns content by name, JSON or tensors, besides what the library itself writes to
    # the folder; `read` loads them with the library's own classes: from images to all tokens, prefix first.
    module: str
    wanted: dict[str, Any]  # the values of `ViTSpec` and `BlockSpec` that fit; a tuple lists alternatives
    how_capped: str  # a sentence for the user of a capped export

    def misfits(self, vit: ViT) -> list[str]:
        """The parts of a backbone that the library does not support; empty = it fits."""
        spec, found = vit.spec, []
        have = asdict(spec) | asdict(spec.block)
        sizes = (spec.grid, spec.image_size, spec.patch_size)
        have["square_images"] = all(height == width for height, width in sizes)
        have["whole_mlp_ratio"] = spec.block.mlp_hidden % spec.block.width == 0
        for name, value in self.wanted.items():
            allowed = value if isinstance(value, tuple) else (value,)
            if have[name] not in allowed:
                found.append(f"{name} is {have[name]}, wanted {' or '.join(map(str, allowed))}")
        return found


_ANY = {
    "activation", "norm_eps", "softcap", "fresh_norm_eps", "position_fixed", "position_prefix", "pooled_norm", "pool",
    "pool_prefix",
}  # fmt: skip
"""Fields that transformers' towers support with any value, or that do not change the tokens."""
_PLAIN = {"square_images": True} | {
    field.name: field.default
    for kind in (ViTSpec, BlockSpec)
    for field in fields(kind)
    if field.name not in _ANY and field.default is not MISSING
}
_DINOV2 = {name: value for name, value in _PLAIN.items() if name not in ("registers", "layer_scale")}
_DINOV3 = _DINOV2 | {
    "position": False,
    "rotary": True,
    "rotate_half": True,
    "layer_scale_keys": "gamma",
    "qkv": ("fused", "no_k_bias"),
    "qkv_bias": (True, False),
    "mlp": ("mlp", "swiglu"),
}
_TIMM = Target(
    "timm",
    "timm_model",
    {},
    "timm itself has no soft-cap: install fastalign and `import fastalign.export.timm_model` before loading. Without "
    "the import timm refuses this folder as an unknown model. An export with `--drop-softcap` needs no import.",
)
_HF = Target(
    "transformers",
    "hf",
    _PLAIN,
    "modeling_fastalign.py here applies the cap: load with `trust_remote_code=True`, transformers 5.20 or newer.",
)
TARGETS = {
    "timm": _TIMM,
    "hf-clip": _HF._replace(wanted=_PLAIN | {"pre_norm": True, "patch_bias": False, "position_prefix": True}),
    "hf-siglip": _HF._replace(wanted=_PLAIN | {"class_token": False}),
    "hf-dinov2": _HF._replace(wanted=_DINOV2 | {"whole_mlp_ratio": True}),
    "hf-dinov3": _HF._replace(wanted=_DINOV3),
    "onnx": Target("onnxruntime", "to_onnx", {}, "The graph contains the cap; nothing else is needed."),
    "prismatic": _TIMM._replace(wanted={"qkv": "fused", "rotary": False, "square_images": True}),
}


def check_names(names: list[str], key: str) -> None:
    """Refuse unknown targets, and those whose library is missing or too old; `key` is for messages."""
    for name in names:
        if name not in TARGETS:
            raise UserError(f"{key}: {unknown('target', name, TARGETS)}; choose from {', '.join(TARGETS)}")
        try:
            import_module(f"fastalign.export.{TARGETS[name].module}")
        except ImportError as error:
            extra = "pip install 'transformers>=5.20' onnx onnxruntime onnxscript"
            raise UserError(f"{key}: {name} needs its library ({first_line(error)}): {extra}") from error


def find_target(name: str, vit: ViT, key: str = "--to") -> Target:
    """The target of this name; UserError if it is unknown or does not fit the backbone; `key` is for messages."""
    check_names([name], key)
    if problems := TARGETS[name].misfits(vit):
        fitting = ", ".join(other for other, target in TARGETS.items() if not target.misfits(vit))
        raise UserError(
            f"{key} {name}: {vit.recipe['name']} does not fit ({'; '.join(problems[:3])}); what fits: {fitting}"
        )
    return TARGETS[name]
