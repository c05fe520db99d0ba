"""To transformers: CLIP, SigLIP and DINOv2 towers, of its own classes or, with a cap, of `fastalign.export.hf`."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.backbones.spec import ViTSpec
from fastalign.backbones.vit import ViT
from fastalign.export import convert
from fastalign.export.source import Run
from fastalign.export.target import Target, Tokens
from fastalign.utils.files import write_tensors


class Transformers(Target):
    """A folder for `from_pretrained`."""

    package = "transformers"
    wanted: dict[str, Any]
    """what `convert.misfits` compares a backbone with"""

    def misfits(self, spec: ViTSpec) -> list[str]:
        return convert.misfits(spec, self.wanted)

    def can_cap(self, spec: ViTSpec) -> bool:
        return True

    def class_name(self, spec: ViTSpec) -> str:
        """transformers' own class."""
        raise NotImplementedError

    def settings(self, vit: ViT) -> dict[str, Any]:
        """Of the class's configuration, beside what all have."""
        return {"intermediate_size": vit.spec.block.mlp_hidden}

    def state(self, vit: ViT) -> dict[str, Tensor]:
        """The weights by their names in files."""
        raise NotImplementedError

    def write(self, run: Run, folder: Path) -> None:
        import transformers

        from fastalign.export import hf

        vit = run.vit
        model = getattr(transformers, self.class_name(vit.spec))
        settings = convert.hf_config(vit.spec) | self.settings(vit)
        if vit.softcap is not None:
            model = hf.aligned_class(model.config_class.model_type)
            settings["softcap"] = vit.softcap
        config = model.config_class(architectures=[model.__name__], dtype="float32", **settings)
        config.save_pretrained(folder)
        write_tensors(folder / "model.safetensors", self.state(vit))
        (folder / "preprocessor_config.json").write_text(json.dumps(_processor(vit), indent=2) + "\n")

    def read(self, folder: Path) -> Tokens:
        """By the class that the folder names. CLIP's own does not norm its tokens, so that is done here."""
        from transformers import AutoModel
        from transformers.utils import logging

        from fastalign.export import hf  # noqa: F401  (registers the classes with a cap)

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        finally:
            if shown:
                logging.enable_progress_bar()
        bare_clip = model.config.model_type == "clip_vision_model"

        def tokens(images: Tensor) -> Tensor:
            last = model(pixel_values=images).last_hidden_state
            return model.post_layernorm(last) if bare_clip else last

        return tokens

    def notes(self, run: Run) -> list[str]:
        """transformers' crop has no setting that rounds as timm's does."""
        size, short = run.vit.spec.image_size[0], _short_side(run.vit)
        which = (
            f"every image (short side {short}, crop {size})"
            if (short - size) % 4 == 3
            else f"images whose longer side is resized to {size} + 3, 7, 11, ... pixels"
        )
        return [
            "Image processor: transformers rounds the offset of a centre crop down, timm to the nearest even number. "
            f"Its crop lies one pixel further left or up than timm's on {which}; timm's own transform gives "
            "the pixels of training and evaluation."
        ]

    def usage(self, run: Run) -> str:
        lines = [
            "from transformers import LlavaForConditionalGeneration",
            "from fastalign.export import hf",
            "",
            'tower = hf.load_tower("FOLDER").eval()',
            "tokens = tower(images).last_hidden_state  # prefix tokens first; hidden_states[-1] is the same",
            "",
            'llava = LlavaForConditionalGeneration(hf.llava_config("FOLDER", text_config))',
            "llava.model.vision_tower = tower",
        ]
        if run.vit.softcap is None:
            name = self.class_name(run.vit.spec)
            last = "tower(images).last_hidden_state"
            lines += ["", "# or without fastalign:", f'tower = {name}.from_pretrained("FOLDER").eval()']
            lines += [f"tokens = {f'tower.post_layernorm({last})' if name.startswith('CLIP') else last}"]
        return "\n".join(lines)


class Clip(Transformers):
    """`CLIPVisionModel`."""

    wanted = convert.CLIP

    def class_name(self, spec: ViTSpec) -> str:
        return "CLIPVisionModel"

    def settings(self, vit: ViT) -> dict[str, Any]:
        return {**super().settings(vit), "projection_dim": vit.embed_dim}

    def state(self, vit: ViT) -> dict[str, Tensor]:
        return convert.clip_state(vit)


class Siglip(Transformers):
    """`SiglipVisionModel`, without the pooling head that alignment drops."""

    wanted = convert.SIGLIP

    def class_name(self, spec: ViTSpec) -> str:
        return "SiglipVisionModel"

    def settings(self, vit: ViT) -> dict[str, Any]:
        return {**super().settings(vit), "vision_use_head": False}

    def state(self, vit: ViT) -> dict[str, Tensor]:
        return convert.clip_state(vit)


class Dinov2(Transformers):
    """`Dinov2Model` or `Dinov2WithRegistersModel`; a plain ViT fits too, with LayerScale factors of one."""

    wanted = convert.DINOV2

    def misfits(self, spec: ViTSpec) -> list[str]:
        found = super().misfits(spec)
        if spec.block.mlp_hidden % spec.block.width:
            found.append(f"mlp_hidden is {spec.block.mlp_hidden}, wanted a multiple of {spec.block.width}")
        return found

    def class_name(self, spec: ViTSpec) -> str:
        return "Dinov2WithRegistersModel" if spec.registers else "Dinov2Model"

    def settings(self, vit: ViT) -> dict[str, Any]:
        registers = {"num_register_tokens": vit.spec.registers} if vit.spec.registers else {}
        return {"mlp_ratio": vit.spec.block.mlp_hidden // vit.embed_dim, **registers}

    def state(self, vit: ViT) -> dict[str, Tensor]:
        return convert.dinov2_state(vit)


def _short_side(vit: ViT) -> int:
    """What an image's short side is resized to before it is cropped."""
    return int(vit.spec.image_size[0] / vit.data["crop_pct"])


def _processor(vit: ViT) -> dict[str, Any]:
    """The backbone's evaluation transform, as transformers' image processor of CLIP."""
    height, width = vit.spec.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": _short_side(vit)},
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
