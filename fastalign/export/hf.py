"""Exports for transformers, loaded without `trust_remote_code`: the module of the export is part of this package.

Importing it makes a capped export, and a saved VLM around one, known to transformers' auto classes.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from fastalign.backbones.weight_files import read_json
from fastalign.export.modeling_fastalign import TOWERS
from fastalign.utils.errors import UserError


def load_tower(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tower of an ``hf-*`` export. Its `hidden_states[-1]` is our features, cap and norm included.

    Args:
        folder: the export, with or without a cap.
        dtype: of the weights.

    Raises:
        UserError: not an export.
    """
    path = Path(folder) / "config.json"
    kind = read_json(path).get("model_type") if path.is_file() else None
    if kind not in TOWERS:
        raise UserError(f"{path} is not of an export --to hf-*, its model type is {kind}: give such a folder")
    return TOWERS[kind].from_pretrained(folder, dtype=dtype)
