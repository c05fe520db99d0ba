"""The names of the authors' package `locality_alignment`, with their signatures, on fastalign's parts.

Change ``import locality_alignment`` into ``import fastalign.compat.locality_alignment as locality_alignment``, or run
an unchanged script: ``python -m fastalign.compat run SCRIPT ...``. docs/compat.md lists the differences.
"""

# ruff: noqa: F401
from . import backbones
from .loss_utils import BernoulliMaskSampler, BlockwiseMaskSampler, UniformMaskSampler
from .model_utils import MaskEmbedDecoder, MaskEmbedStudent, MaskLayer, TransformerPooling
from .student_utils import convert_to_mim_student_model, convert_to_student_model
from .teacher_utils import convert_to_mim_teacher_model, convert_to_teacher_model
from .train_utils import CheckpointSaver, load_checkpoint, load_checkpoint_auto
