"""Files for timm, and so for Prismatic, and timm's vision transformers with soft-capped attention.

Import it before ``timm.create_model("local-dir:FOLDER", pretrained=True)`` of a folder that
``fastalign export --to timm`` (or prismatic) wrote with a cap. Without the import timm refuses the folder,
as an unknown model, instead of silently dropping the cap.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.models import register_model
from torch import Tensor, nn

from fastalign.backbones import naflex
from fastalign.backbones.accelerate import accelerate
from fastalign.backbones.zoo import MOCO
from fastalign.export.run import Run

CAPPED = (
    "fastalign_softcap.attention logits are capped: install fastalign and `import fastalign.export.timm_model` "
    "first, or export again with --drop-softcap"
)
"""The architecture in config.json. timm takes the text after the first dot for a tag; if it does not know the name
before the dot, its error prints all of this."""


@register_model
def fastalign_softcap(pretrained: bool = False, *, architecture: str, softcap: float, **kwargs) -> nn.Module:
    """timm's `architecture` with capped attention logits; the other arguments are timm's."""
    kwargs.pop("pretrained_model_args", None)  # of this model; the inner one has its own
    return accelerate(timm.create_model(architecture, pretrained=pretrained, **kwargs), softcap=softcap)


def files(run: Run, folder: Path, target: str) -> dict[str, Any]:
    """A folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""
    vit, architecture, state = run.vit, run.facts["name"].split(".")[0], run.vit.state_dict()
    architecture = "vit_base_patch16_224" if architecture == MOCO else architecture
    dropped = ("num_classes", "drop_path_rate")
    arguments = {key: value for key, value in run.facts["kwargs"].items() if key not in dropped}
    if is_naflex := "pos_embed_grid_size" in arguments:
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
            "first_conv": "embeds.proj" if is_naflex else "patch_embed.proj",
            "classifier": "head",
            "license": run.source()["licence"],
        },
    }
    return {"config.json": config, "model.safetensors": state}


def read(folder: Path) -> Callable[[Tensor], Tensor]:
    """Load the folder as a user does: normalized images -> all tokens."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features
