"""To timm, and to Prismatic, which makes its backbones with timm."""

import json
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from fastalign.backbones.spec import ViTSpec
from fastalign.export.source import Run
from fastalign.export.target import Target, Tokens
from fastalign.export.timm_model import ARCHITECTURE
from fastalign.utils.files import write_tensors


class Timm(Target):
    """timm's own folder format. With a cap the architecture is that of `fastalign.export.timm_model`."""

    def can_cap(self, spec: ViTSpec) -> bool:
        return True

    def write(self, run: Run, folder: Path) -> None:
        arguments = {
            k: v for k, v in run.facts["kwargs"].items() if k not in ("num_classes", "drop_path_rate")
        }
        architecture = run.timm_name
        if run.vit.softcap is not None:
            arguments |= {"architecture": architecture, "softcap": run.vit.softcap}
            architecture = ARCHITECTURE
        config = {
            "architecture": architecture,
            "num_classes": 0,
            "num_features": run.vit.embed_dim,
            "model_args": arguments,
            "pretrained_cfg": {
                "tag": "locality_aligned",
                "input_size": [run.vit.spec.channels, *run.vit.spec.image_size],
                "fixed_input_size": True,
                "num_classes": 0,
                **run.vit.data,
                "crop_mode": "center",
                "first_conv": "patch_embed.proj",
                "classifier": "head",
                "license": run.source()["licence"],
            },
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: value.contiguous() for name, value in run.vit.state_dict().items()}
        write_tensors(folder / "model.safetensors", weights)

    def read(self, folder: Path) -> Tokens:
        return self.load(folder).forward_features

    def load(self, folder: Path, **kwargs) -> nn.Module:
        """timm's model."""
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()

    def usage(self, run: Run) -> str:
        return (
            f'import timm\n{_imports(run)}\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
            "tokens = model.forward_features(images)  # prefix tokens first"
        )


class Prismatic(Timm):
    """timm's format, for Prismatic's `TimmViTBackbone`."""

    def misfits(self, spec: ViTSpec) -> list[str]:
        found = [] if spec.block.qkv == "fused" else ["Prismatic takes timm's VisionTransformer only"]
        return found + (["its images are not square"] if len({*spec.image_size}) > 1 else [])

    def read(self, folder: Path) -> Tokens:
        """As `TimmViTBackbone` makes and reads it, but for the layer: the last one, normed, the prefix kept."""
        config = json.loads((folder / "config.json").read_text())
        size = config["pretrained_cfg"]["input_size"][-1]
        model = self.load(folder, num_classes=0, img_size=size)

        def tokens(images: Tensor) -> Tensor:
            options = {"n": {len(model.blocks) - 1}, "norm": True}
            if not model.num_prefix_tokens:
                return model.get_intermediate_layers(images, **options)[0]
            patches, prefix = model.get_intermediate_layers(images, **options, return_prefix_tokens=True)[0]
            return torch.cat([prefix, patches], 1)

        return tokens

    def usage(self, run: Run) -> str:
        return (
            f"{_imports(run)}# in Prismatic's registry, with default_image_size={run.vit.spec.image_size[0]}:\n"
            'timm_path_or_url = "local-dir:FOLDER"\n'
            "# in TimmViTBackbone.__init__, instead of the second-to-last layer:\n"
            "self.featurizer.forward = unpack_tuple(\n"
            "    partial(self.featurizer.get_intermediate_layers, n={len(self.featurizer.blocks) - 1}, norm=True)\n)"
        )


def _imports(run: Run) -> str:
    return "import fastalign.export.timm_model  # the soft-cap\n" if run.vit.softcap is not None else ""
