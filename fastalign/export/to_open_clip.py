"""To open_clip: the vision tower alone; a run has no text tower."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastalign.backbones.spec import ViTSpec
from fastalign.backbones.vit import ViT
from fastalign.export import convert
from fastalign.export.source import Run
from fastalign.export.target import Target, Tokens
from fastalign.utils.files import write_tensors

NO_TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
"""The smallest text tower: open_clip builds no vision tower without one."""


class OpenClip(Target):
    """The weights of `open_clip.CLIP(...).visual`, and the arguments that build it."""

    package = "open_clip"

    def misfits(self, spec: ViTSpec) -> list[str]:
        found, block = convert.misfits(spec, convert.CLIP), spec.block
        if block.activation not in ("gelu", "gelu_tanh", "quick_gelu"):
            found.append(f"activation is {block.activation}, wanted gelu or quick_gelu")
        if int(block.width * (block.mlp_hidden / block.width)) != block.mlp_hidden:
            found.append(f"mlp_hidden is {block.mlp_hidden}, which a ratio cannot express")
        return found

    def can_cap(self, spec: ViTSpec) -> bool:
        return False  # it calls torch's MultiheadAttention, which takes no other attention

    def write(self, run: Run, folder: Path) -> None:
        text = json.dumps(_config(run.vit), indent=2) + "\n"
        (folder / "visual.json").write_text(text)
        write_tensors(folder / "visual.safetensors", convert.open_clip_state(run.vit))

    def read(self, folder: Path) -> Tokens:
        import open_clip

        config = json.loads((folder / "visual.json").read_text())
        visual = open_clip.CLIP(**config, text_cfg=NO_TEXT).visual.eval()
        visual.load_state_dict(load_file(folder / "visual.safetensors"))

        def tokens(images: Tensor) -> Tensor:
            first, patches = visual(images)
            return torch.cat([first[:, None], patches], 1)

        return tokens

    def usage(self, run: Run) -> str:
        return (
            "import json, open_clip\nfrom safetensors.torch import load_file\n\n"
            'config = json.load(open("FOLDER/visual.json"))\n'
            "visual = open_clip.CLIP(**config, text_cfg=open_clip.CLIPTextCfg(layers=1)).visual.eval()\n"
            'visual.load_state_dict(load_file("FOLDER/visual.safetensors"))\n'
            "class_token, patches = visual(images)"
        )


def _config(vit: ViT) -> dict[str, Any]:
    block = vit.spec.block
    vision = {
        "layers": vit.spec.depth,
        "width": block.width,
        "head_width": block.width // block.heads,
        "mlp_ratio": block.mlp_hidden / block.width,
        "patch_size": vit.spec.patch_size[0],
        "image_size": vit.spec.image_size[0],
        "norm_kwargs": {"eps": block.norm_eps},
        "act_kwargs": {"approximate": "tanh"} if block.activation == "gelu_tanh" else None,
        "output_tokens": True,
    }
    return {"embed_dim": block.width, "vision_cfg": vision, "quick_gelu": block.activation == "quick_gelu"}
