"""fastalign: locality alignment of vision transformers by MaskEmbed, exact and fast."""

from fastalign.errors import UserError
from fastalign.masks import BernoulliMasks, BlockwiseMasks, UniformMasks
from fastalign.models.student import MaskEmbedStudent, MIMStudent
from fastalign.models.teacher import MaskedTeacher
from fastalign.models.zoo import create_backbone, load_backbone
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
    "create_backbone",
    "load_backbone",
]
