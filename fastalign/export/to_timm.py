"""Files for timm, and so for Prismatic."""

from pathlib import Path

import timm

from fastalign.backbones import naflex
from fastalign.backbones.zoo import MOCO
from fastalign.export.run import Run
from fastalign.export.timm_model import CAPPED
from fastalign.export.towers import Tokens, write_json
from fastalign.utils.files import write_tensors

HOW_CAPPED = (
    "timm does not cap by itself: install fastalign and `import fastalign.export.timm_model` before loading. Without "
    "the import timm refuses this folder as an unknown model. An export with `--drop-softcap` needs no import."
)


def write(run: Run, folder: Path) -> None:
    """Write a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""
    vit, architecture, state = run.vit, run.facts["name"].split(".")[0], run.vit.state_dict()
    architecture = "vit_base_patch16_224" if architecture == MOCO else architecture
    dropped = ("num_classes", "drop_path_rate")
    arguments = {key: value for key, value in run.facts["kwargs"].items() if key not in dropped}
    if flexible := "pos_embed_grid_size" in arguments:
        state = naflex.timm_state(state, vit.spec.grid)
    if vit.softcap is not None:
        arguments |= {"architecture": architecture, "softcap": vit.softcap}
        architecture = CAPPED
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
            "first_conv": "embeds.proj" if flexible else "patch_embed.proj",
            "classifier": "head",
            "license": run.source()["licence"],
        },
    }
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", {k: v.contiguous() for k, v in state.items()})


def read(folder: Path) -> Tokens:
    """Load the folder as a user does."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features


def _import(run: Run) -> str:
    return "import fastalign.export.timm_model  # the soft-cap\n" if run.vit.softcap is not None else ""


def usage(run: Run) -> str:
    """Lines of Python for the model card."""
    return (
        f"import timm\n{_import(run)}\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
        "tokens = model.forward_features(images)  # prefix tokens first"
    )


def prismatic_usage(run: Run) -> str:
    """Lines of Python for the model card, to be put into Prismatic's code."""
    return (
        f"{_import(run)}# in Prismatic's registry, with default_image_size={run.vit.spec.image_size[0]}:\n"
        'timm_path_or_url = "local-dir:FOLDER"\n'
        "# in TimmViTBackbone.__init__, instead of the second-to-last layer:\n"
        "self.featurizer.forward = unpack_tuple(\n"
        "    partial(self.featurizer.get_intermediate_layers, n={len(self.featurizer.blocks) - 1}, norm=True)\n)"
    )
