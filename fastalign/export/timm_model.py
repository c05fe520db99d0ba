"""timm's vision transformers with soft-capped attention.

Import it before ``timm.create_model("local-dir:FOLDER", pretrained=True)`` of a folder that
``fastalign export --to timm`` (or prismatic) wrote with a cap. Without the import timm refuses the folder,
as an unknown model, instead of silently dropping the cap.
"""

import timm
from timm.models import register_model
from torch import nn

from fastalign.backbones.accelerate import accelerate

CAPPED = (
    "fastalign_softcap.attention logits are capped: install fastalign and `import fastalign.export.timm_model` "
    "first, or export again with --drop-softcap"
)
"""The architecture in config.json. timm takes what follows the first dot for a tag, and prints it all if it does not
know the name before it."""


@register_model
def fastalign_softcap(pretrained: bool = False, *, architecture: str, softcap: float, **kwargs) -> nn.Module:
    """timm's `architecture` with capped attention logits; the other arguments are timm's."""
    kwargs.pop("pretrained_model_args", None)  # of this model; the inner one has its own
    return accelerate(timm.create_model(architecture, pretrained=pretrained, **kwargs), softcap=softcap)
