"""timm's vision transformers with soft-capped attention.

Import it before ``timm.create_model("local-dir:FOLDER", pretrained=True)`` of a folder that
``python -m fastalign.export --to timm`` (or prismatic) wrote with a cap: its architecture is `fastalign_softcap`,
timm's own after `fastalign.backbones.accelerate`. Without the import timm refuses it,
as a model it does not know, instead of dropping the cap in silence.
"""

import timm
from timm.models import register_model
from torch import nn

from fastalign.backbones.accelerate import accelerate

ARCHITECTURE = "fastalign_softcap"


@register_model
def fastalign_softcap(pretrained: bool = False, *, architecture: str, softcap: float, **kwargs) -> nn.Module:
    """timm's `architecture` with capped attention logits; what else timm passes on is its own."""
    kwargs.pop("pretrained_model_args", None)  # ours; the inner model has its own
    return accelerate(timm.create_model(architecture, pretrained=pretrained, **kwargs), softcap=softcap)
