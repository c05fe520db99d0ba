"""The libraries that a backbone can be exported to: what fits, the files, and how they are read back."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastalign.backbones.layouts import OPEN_CLIP
from fastalign.backbones.spec import ViTSpec
from fastalign.export import to_onnx, to_timm, towers
from fastalign.export.run import Run
from fastalign.export.towers import Tokens, convert, write_json
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_tensors

EXTRA = "'transformers>=5.20' 'open_clip_torch>=3.3' onnx onnxruntime onnxscript"
"""The packages of the extra `export`."""


class Target(NamedTuple):
    """A library's format. The soft-cap to write is the backbone's: None if it is dropped."""

    package: str
    """must be installed"""
    wanted: dict[str, Any] | None
    """the fields of `ViTSpec` that the library can express; None = every backbone fits"""
    write: Callable[[Run, Path], list[str] | None]
    """returns sentences for the user"""
    read: Callable[[Path], Tokens]
    """loads the files with the library's own classes"""
    usage: Callable[[Run], str]
    """lines of Python for the model card: with FOLDER and `images`, they compute `tokens`"""
    how_capped: str | None
    """a sentence for the user of a capped export; None = the library cannot cap"""
    notes: tuple[str, ...] = ()
    """sentences for the user"""

    def misfits(self, spec: ViTSpec) -> list[str]:
        """What of a backbone the library cannot express; empty = the backbone fits."""
        found = []
        for name, value in (self.wanted or {}).items():
            if (have := attrgetter(name)(spec)) != value:
                found.append(f"{name.removeprefix('block.')} is {have}, wanted {value}")
        square = all(len({*size}) == 1 for size in (spec.grid, spec.image_size, spec.patch_size))
        if self.wanted is not None and not square:
            found.append(f"images of {spec.image_size[0]}x{spec.image_size[1]}, wanted square ones")
        return found


def find_target(name: str, run: Run) -> Target:
    """The target of a name, checked against the backbone."""
    target = TARGETS[name]
    if find_spec(target.package) is None:
        raise UserError(f"--to {name} needs {target.package}: pip install {EXTRA}")
    if problems := target.misfits(run.vit.spec):
        fitting = ", ".join(other for other in TARGETS if not TARGETS[other].misfits(run.vit.spec))
        raise UserError(
            f"--to {name}: {run.facts['name']} does not fit ({'; '.join(problems[:3])}); what fits: {fitting}"
        )
    return target


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


_TIMM = (to_timm.write, to_timm.read)
TARGETS = {
    "timm": Target("timm", None, *_TIMM, to_timm.usage, to_timm.HOW_CAPPED),
    **{
        f"hf-{name}": Target(
            "transformers",
            t.wanted,
            t.write,
            towers.read,
            t.usage,
            towers.HOW_CAPPED,
            (towers.PROCESSOR_NOTE,),
        )
        for name, t in {"clip": towers.CLIP, "siglip": towers.SIGLIP, "dinov2": towers.DINOV2}.items()
    },
    "open-clip": Target(
        "open_clip", towers.CLIP.wanted, _write_open_clip, _read_open_clip, _open_clip_usage, None
    ),
    "onnx": Target("onnxruntime", None, to_onnx.write, to_onnx.read, to_onnx.usage, to_onnx.HOW_CAPPED),
    "prismatic": Target("timm", {"block.qkv": "fused"}, *_TIMM, to_timm.prismatic_usage, to_timm.HOW_CAPPED),
}
