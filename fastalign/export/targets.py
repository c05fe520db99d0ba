"""The libraries that a backbone can be exported to: what fits, the files, and how they are read back."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastalign.backbones.layouts import OPEN_CLIP
from fastalign.backbones.spec import ViTSpec
from fastalign.backbones.zoo import MOCO
from fastalign.export import towers
from fastalign.export.run import Run
from fastalign.export.timm_model import ARCHITECTURE
from fastalign.export.towers import Tokens, convert, write_json
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_tensors


class Target(NamedTuple):
    """A library's format. The soft-cap to write is the backbone's: None if it is dropped."""

    package: str
    """must be installed"""
    wanted: dict[str, Any] | None
    """the fields of `ViTSpec` that the library can express; None = every backbone fits"""
    write: Callable[[Run, Path], None]
    read: Callable[[Path], Tokens]
    """loads the files with the library's own classes"""
    usage: Callable[[Run], str]
    """lines of Python for the model card"""
    can_cap: bool = True
    notes: tuple[str, ...] = ()
    """sentences for the user"""

    def misfits(self, spec: ViTSpec) -> list[str]:
        """What of a backbone the library cannot express; empty = the backbone fits."""
        found = []
        for name, value in (self.wanted or {}).items():
            have = attrgetter(name)(spec)
            if (have or None) != (value or None):  # absent is None, False or 0
                found.append(f"{name.removeprefix('block.')} is {have}, wanted {value}")
        square = all(len({*size}) == 1 for size in (spec.grid, spec.image_size, spec.patch_size))
        if self.wanted is not None and not square:
            found.append(f"images of {spec.image_size[0]}x{spec.image_size[1]}, wanted square ones")
        return found


def find_target(name: str, run: Run) -> Target:
    """The target of a name, checked against the backbone."""
    target = TARGETS[name]
    if find_spec(target.package) is None:
        raise UserError(
            f"--to {name} needs {target.package}: pip install 'transformers>=5.20' 'open_clip_torch>=3.3'"
        )
    if problems := target.misfits(run.vit.spec):
        fitting = ", ".join(other for other in TARGETS if not TARGETS[other].misfits(run.vit.spec))
        raise UserError(
            f"--to {name}: {run.facts['name']} does not fit ({'; '.join(problems[:3])}); what fits: {fitting}"
        )
    return target


def _write_timm(run: Run, folder: Path) -> None:
    vit, architecture = run.vit, run.facts["name"].split(".")[0]
    architecture = "vit_base_patch16_224" if architecture == MOCO else architecture
    dropped = ("num_classes", "drop_path_rate")
    arguments = {key: value for key, value in run.facts["kwargs"].items() if key not in dropped}
    if vit.softcap is not None:
        arguments |= {"architecture": architecture, "softcap": vit.softcap}
        architecture = ARCHITECTURE
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": vit.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "locality_aligned",
            "input_size": [vit.spec.channels, *vit.spec.image_size],
            "fixed_input_size": True,
            "num_classes": 0,
            **vit.data,
            "crop_mode": "center",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": run.source()["licence"],
        },
    }
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", {k: v.contiguous() for k, v in vit.state_dict().items()})


def _read_timm(folder: Path) -> Tokens:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features


def _timm_import(run: Run) -> str:
    return "import fastalign.export.timm_model  # the soft-cap\n" if run.vit.softcap is not None else ""


def _timm_usage(run: Run) -> str:
    return (
        f"import timm\n{_timm_import(run)}\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
        "tokens = model.forward_features(images)  # prefix tokens first"
    )


def _prismatic_usage(run: Run) -> str:
    return (
        f"{_timm_import(run)}# in Prismatic's registry, with default_image_size={run.vit.spec.image_size[0]}:\n"
        'timm_path_or_url = "local-dir:FOLDER"\n'
        "# in TimmViTBackbone.__init__, instead of the second-to-last layer:\n"
        "self.featurizer.forward = unpack_tuple(\n"
        "    partial(self.featurizer.get_intermediate_layers, n={len(self.featurizer.blocks) - 1}, norm=True)\n)"
    )


_NO_TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
"""The smallest text tower: open_clip builds no vision tower without one."""


def _write_open_clip(run: Run, folder: Path) -> None:
    spec, block = run.vit.spec, run.vit.spec.block
    vision = {
        "layers": spec.depth,
        "width": block.width,
        "head_width": block.width // block.heads,
        "mlp_ratio": block.mlp_hidden / block.width,
        "patch_size": spec.patch_size[0],
        "image_size": spec.image_size[0],
        "norm_kwargs": {"eps": block.norm_eps},
        "act_kwargs": {"approximate": "tanh"} if block.activation == "gelu_tanh" else None,
        "output_tokens": True,
    }
    quick = block.activation == "quick_gelu"
    write_json(folder / "visual.json", {"embed_dim": block.width, "vision_cfg": vision, "quick_gelu": quick})
    state = run.vit.state_dict() | {"proj": torch.eye(block.width)}  # alignment has no projection
    write_tensors(folder / "visual.safetensors", convert(state, OPEN_CLIP))


def _read_open_clip(folder: Path) -> Tokens:
    import open_clip

    config = json.loads((folder / "visual.json").read_text())
    visual = open_clip.CLIP(**config, text_cfg=_NO_TEXT).visual.eval()
    visual.load_state_dict(load_file(folder / "visual.safetensors"))

    def tokens(images: Tensor) -> Tensor:
        first, patches = visual(images)
        return torch.cat([first[:, None], patches], 1)

    return tokens


def _open_clip_usage(run: Run) -> str:
    return (
        "import json, open_clip\nfrom safetensors.torch import load_file\n\n"
        'config = json.load(open("FOLDER/visual.json"))\n'
        "visual = open_clip.CLIP(**config, text_cfg=open_clip.CLIPTextCfg(layers=1)).visual.eval()\n"
        'visual.load_state_dict(load_file("FOLDER/visual.safetensors"))\n'
        "class_token, patches = visual(images)"
    )


_NOTES = (towers.PROCESSOR_NOTE,)
TARGETS = {
    "timm": Target("timm", None, _write_timm, _read_timm, _timm_usage),
    **{
        f"hf-{name}": Target("transformers", t.wanted, t.write, towers.read, t.usage, notes=_NOTES)
        for name, t in {"clip": towers.CLIP, "siglip": towers.SIGLIP, "dinov2": towers.DINOV2}.items()
    },
    "open-clip": Target(
        "open_clip", towers.CLIP.wanted, _write_open_clip, _read_open_clip, _open_clip_usage, can_cap=False
    ),
    "prismatic": Target("timm", {"block.qkv": "fused"}, _write_timm, _read_timm, _prismatic_usage),
}
