"""fastalign: locality alignment of vision transformers by MaskEmbed."""

import importlib
from typing import TYPE_CHECKING

from fastalign import kernels, ops
from fastalign.backbones.weight_files import save_backbone
from fastalign.method import masks
from fastalign.method.masks import BernoulliMasks, BlockwiseMasks, UniformMasks
from fastalign.method.objectives import MaskedImageModeling, MaskEmbed
from fastalign.method.student import MaskEmbedStudent, MIMStudent
from fastalign.method.teacher import MaskedTeacher
from fastalign.utils.errors import UserError
from fastalign.utils.files import set_container_defaults

if TYPE_CHECKING:
    from fastalign.api import align
    from fastalign.backbones.accelerate import accelerate, accelerated
    from fastalign.backbones.zoo import create_backbone, load_backbone, transform

__version__ = "0.1.0"
__all__ = [
    "BernoulliMasks",
    "BlockwiseMasks",
    "MIMStudent",
    "MaskEmbed",
    "MaskEmbedStudent",
    "MaskedImageModeling",
    "MaskedTeacher",
    "UniformMasks",
    "UserError",
    "accelerate",
    "accelerated",
    "align",
    "create_backbone",
    "kernels",
    "load_backbone",
    "masks",
    "ops",
    "save_backbone",
    "transform",
]


def __getattr__(name: str):
    """Import what needs timm only when it is used: importing timm takes longer than everything else."""
    if name not in __all__:
        raise AttributeError(f"module 'fastalign' has no attribute {name!r}")
    module = {"align": "api", "accelerate": "backbones.accelerate", "accelerated": "backbones.accelerate"}
    return getattr(importlib.import_module(f"fastalign.{module.get(name, 'backbones.zoo')}"), name)


def __dir__() -> list[str]:
    return __all__


set_container_defaults()  # before timm is imported
