"""fastalign: locality alignment of vision transformers by MaskEmbed, exact and fast."""

from pathlib import Path

from fastalign import kernels, masks, ops
from fastalign.accelerate import accelerate, accelerated
from fastalign.errors import UserError
from fastalign.masks import BernoulliMasks, BlockwiseMasks, UniformMasks
from fastalign.models.student import MaskEmbedStudent, MIMStudent
from fastalign.models.teacher import MaskedTeacher
from fastalign.models.zoo import create_backbone, load_backbone, transform
from fastalign.objectives import MaskedImageModeling, MaskEmbed

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
    "create_backbone",
    "kernels",
    "load_backbone",
    "masks",
    "ops",
    "transform",
]


def _needs_triton(name: str):
    """What a kernel's name leads to where triton is missing: a reason, in place of a missing attribute."""
    if not any((Path(folder) / f"{name}.py").is_file() for folder in kernels.__path__):
        raise AttributeError(f"fastalign.kernels has no {name}")
    raise ImportError(
        f"fastalign.kernels.{name} needs the package triton: pip install triton; fastalign.ops works without it"
    )


if not ops.TRITON:
    kernels.__getattr__ = _needs_triton
