"""The names of the authors' package `locality_alignment`, with their signatures, on fastalign's parts.

Change ``import locality_alignment`` into ``import fastalign.compat.locality_alignment as locality_alignment``, or run
a script as it is: ``python -m fastalign.compat run SCRIPT ...``. docs/compat.md lists what differs.
"""

from fastalign.compat.locality_alignment import backbones
from fastalign.compat.locality_alignment.loss_utils import (
    BernoulliMaskSampler,
    BlockwiseMaskSampler,
    UniformMaskSampler,
)
from fastalign.compat.locality_alignment.model_utils import (
    MaskEmbedDecoder,
    MaskEmbedStudent,
    MaskLayer,
    TransformerPooling,
)
from fastalign.compat.locality_alignment.student_utils import (
    convert_to_mim_student_model,
    convert_to_student_model,
)
from fastalign.compat.locality_alignment.teacher_utils import (
    convert_to_mim_teacher_model,
    convert_to_teacher_model,
)
from fastalign.compat.locality_alignment.train_utils import (
    CheckpointSaver,
    load_checkpoint,
    load_checkpoint_auto,
)

__all__ = [
    "BernoulliMaskSampler",
    "BlockwiseMaskSampler",
    "CheckpointSaver",
    "MaskEmbedDecoder",
    "MaskEmbedStudent",
    "MaskLayer",
    "TransformerPooling",
    "UniformMaskSampler",
    "backbones",
    "convert_to_mim_student_model",
    "convert_to_mim_teacher_model",
    "convert_to_student_model",
    "convert_to_teacher_model",
    "load_checkpoint",
    "load_checkpoint_auto",
]
