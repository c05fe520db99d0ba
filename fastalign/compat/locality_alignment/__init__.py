"""The names of the authors' package `locality_alignment`, with their signatures, on fastalign's parts.

Change ``import locality_alignment`` into ``import fastalign.compat.locality_alignment as locality_alignment``, or run
an unchanged script: ``python -m fastalign.compat run SCRIPT ...``. docs/compat.md lists the differences.
"""

# ruff: noqa: F401
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
